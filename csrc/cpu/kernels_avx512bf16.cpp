// Compiled with avx512's and -mavx512bf16: see setup.py. Empty where the compiler or the architecture has none of it.
#define NORMWEAR_ISA avx512bf16
#define NORMWEAR_ISA_NAME "avx512bf16"

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#include "kernels_impl.h"
#endif
