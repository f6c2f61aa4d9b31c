// Compiled with -mavx2 -mfma: see setup.py. Empty where the compiler or the architecture has none of it.
#define NORMWEAR_ISA avx2
#define NORMWEAR_ISA_NAME "avx2"

#if defined(__AVX2__) && defined(__FMA__)
#include "kernels_impl.h"
#endif
