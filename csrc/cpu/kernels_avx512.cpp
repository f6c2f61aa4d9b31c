// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma: see setup.py. Empty where the compiler or the architecture has none of it.
#define NORMWEAR_ISA avx512
#define NORMWEAR_ISA_NAME "avx512"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include "kernels_impl.h"
#endif
