// Compiled without any: see setup.py.
#define NORMWEAR_ISA portable
#define NORMWEAR_ISA_NAME "portable"

#include "kernels_impl.h"
