// Compiled with avx512bf16's flags and, where the compiler takes them, the tile unit's: see setup.py. Empty elsewhere.
#define NORMWEAR_ISA amx
#define NORMWEAR_ISA_NAME "amx"

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__) && (defined(__AMX_TILE__) || defined(NORMWEAR_EMULATE_TILES))
#define NORMWEAR_TILES
#include "kernels_impl.h"
#endif
