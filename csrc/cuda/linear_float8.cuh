// linear_float8's epilogue, value by value: what the kernel and its emulation share.
#pragma once

#include "block.cuh"
#include "launch.h"

namespace normwear::cuda {

// GELU for a result of four significant bits: max(x, 0) - |x| Phi(-|x|), Phi(-a) = 2^p(a) as in
// kernels/bias_gelu.py, p of degree 4 fitted on [0, 5.5] for the least largest error of Phi, 0.16 %.
// Beyond that |x| Phi(-|x|) stays the 1e-7 it is there.
NORMWEAR_DEVICE float gelu_float8(float x) {
#ifdef __CUDA_ARCH__
    const float a = fminf(fabsf(x), 5.5f);
    float kept;  // fmaxf would lose a NaN
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(kept) : "f"(x));
#else
    const float a = std::fmin(std::fabs(x), 5.5f);
    const float kept = x < 0 ? 0.0f : x;
#endif
    float p = 1.71350967e-3f;
    p = p * a - 2.97207871e-2f;
    p = p * a - 4.98106250e-1f;
    p = p * a - 1.12746254f;
    p = p * a - 1.00231397f;
#ifdef __CUDA_ARCH__
    float tail;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(tail) : "f"(p));
#else
    const float tail = std::exp2(p);
#endif
    return kept - a * tail;
}

// A column's sum, scaled, with its bias.
NORMWEAR_DEVICE float scaled_sum(float sum, float x_scale, float scale, float bias) {
    return sum * x_scale * scale + bias;
}

}  // namespace normwear::cuda
