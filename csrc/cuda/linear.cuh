// Epilogues of the products, value by value: what the kernels and their emulation share.
#pragma once

#include "block.cuh"
#include "launch.h"

namespace normwear::cuda {

// max(x, 0) - |x| Phi(-|x|) from a = min(|x|, 5.5) and Phi(-a): beyond 5.5 |x| Phi(-|x|) stays the 1e-7 it
// is there.
NORMWEAR_DEVICE float gelu_of(float x, float a, float log2_phi) {
#ifdef __CUDA_ARCH__
    float kept, tail;  // fmaxf would lose a NaN
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(kept) : "f"(x));
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(tail) : "f"(log2_phi));
#else
    const float kept = x < 0 ? 0.0f : x;
    const float tail = std::exp2(log2_phi);
#endif
    return kept - a * tail;
}

NORMWEAR_DEVICE float gelu_reach(float x) {
#ifdef __CUDA_ARCH__
    return fminf(fabsf(x), 5.5f);
#else
    return std::fmin(std::fabs(x), 5.5f);
#endif
}

// GELU for a result of four significant bits: Phi(-a) = 2^p(a) as in kernels/bias_gelu.py, p of degree 4
// fitted on [0, 5.5] for the least largest error of Phi, 0.16 %.
NORMWEAR_DEVICE float gelu_float8(float x) {
    const float a = gelu_reach(x);
    float p = 1.71350967e-3f;
    p = p * a - 2.97207871e-2f;
    p = p * a - 4.98106250e-1f;
    p = p * a - 1.12746254f;
    p = p * a - 1.00231397f;
    return gelu_of(x, a, p);
}

// The same for eight significant bits, of degree 6 as in kernels/linear_gelu.py: 0.003 %.
NORMWEAR_DEVICE float gelu_bfloat16(float x) {
    const float a = gelu_reach(x);
    float p = 2.61537498e-5f;
    p = p * a - 6.60981168e-4f;
    p = p * a + 7.48830941e-3f;
    p = p * a - 5.19704036e-2f;
    p = p * a - 4.60329473e-1f;
    p = p * a - 1.15058398f;
    p = p * a - 1.00003612f;
    return gelu_of(x, a, p);
}

// A column's sum, scaled, with its bias.
NORMWEAR_DEVICE float scaled_sum(float sum, float x_scale, float scale, float bias) {
    return sum * x_scale * scale + bias;
}

}  // namespace normwear::cuda
