// Vectors of an instruction set in the compiler's types, their conversions, and the functions of a vector.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
// GCC warns about the operands that its own unmasked AVX-512 forms leave undefined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wunknown-warning-option"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "team.h"

namespace normwear {
namespace NORMWEAR_ISA {
namespace {

// TALL: rows of a tile of a product; BLOCK: of the rows that go through an MLP together, at most.
#if defined(NORMWEAR_TILES)
constexpr int WIDTH = 16, TALL = 16, BLOCK = 256;
#elif defined(__AVX512F__)
constexpr int WIDTH = 16, TALL = 14, BLOCK = 84;
#elif defined(__AVX2__)
constexpr int WIDTH = 8, TALL = 6, BLOCK = 96;
#else
constexpr int WIDTH = 4, TALL = 6, BLOCK = 48;
#endif
constexpr int NV = 2;
constexpr int LANES = NV * WIDTH;

typedef float vf __attribute__((vector_size(WIDTH * 4)));
typedef int32_t vi __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t vu __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t vh __attribute__((vector_size(WIDTH * 2)));
typedef uint8_t vb __attribute__((vector_size(WIDTH)));
typedef uint32_t quad __attribute__((vector_size(16)));

template <typename V, typename T>
inline V load(const T* p) {
    V v;
    memcpy(&v, p, sizeof(V));
    return v;
}
template <typename V, typename T>
inline void store(T* p, V v) {
    memcpy(p, &v, sizeof(V));
}
inline vf broadcast(float x) { return x - vf{}; }
inline vf as_float(vi x) { return (vf)x; }
inline vi as_int(vf x) { return (vi)x; }
// The intrinsics are the comparison below in one instruction, which compilers find only when told that
// NaN does not matter.
#if defined(__AVX512F__)
inline vf maximum(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
inline vf minimum(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
inline vf maximum(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
inline vf minimum(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
inline vf maximum(vf a, vf b) { return a > b ? a : b; }
inline vf minimum(vf a, vf b) { return a < b ? a : b; }
#endif
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The lower or upper halves of two quads, alternating.
template <int HALF>
inline quad zip(quad a, quad b) {
    constexpr uint32_t i = 2 * HALF;
#if defined(__clang__)
    return __builtin_shufflevector(a, b, i, i + 4, i + 1, i + 5);
#else
    return __builtin_shuffle(a, b, quad{i, i + 4, i + 1, i + 5});
#endif
}

inline float sum_lanes(vf v) {
    float x[WIDTH];
    store(x, v);
    for (int half = WIDTH / 2; half; half /= 2) {
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
    }
    return x[0];
}
inline float largest_lane(vf v) {
    float x[WIDTH];
    store(x, v);
    for (int half = WIDTH / 2; half; half /= 2) {
        for (int i = 0; i < half; ++i) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
    }
    return x[0];
}

// Whether any bit of any lane is set.
inline bool any(vi v) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)v, (__m512i)v);
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)v, (__m256i)v);
#else
    int32_t all = 0;
    for (int i = 0; i < WIDTH; ++i) all |= v[i];
    return all;
#endif
}

// To the nearest even, as every conversion to bfloat16 in the project.
inline uint16_t to_bfloat16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
inline float from_bfloat16(uint16_t x) {
    const uint32_t u = static_cast<uint32_t>(x) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
inline vf load_bfloat16(const uint16_t* p) { return (vf)(__builtin_convertvector(load<vh>(p), vu) << 16); }
inline vu rounded_bfloat16(vf x) {
    const vu u = (vu)x;
    const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const vu nan = (vu)((u & 0x7fffffffu) > 0x7f800000u);
    return (nan & 0x7fc0u) | (~nan & rounded);
}
inline void store_bfloat16(uint16_t* p, vf x) { store(p, __builtin_convertvector(rounded_bfloat16(x), vh)); }

// 2^x: nearest integer by the 1.5 * 2^23 trick, minimax polynomial on [-1/2, 1/2], exponent added as an
// integer (the trick's own bits are shifted out). Degree 6 for float32, relative error 2e-9 before rounding;
// degree 3 for what is rounded to bfloat16 next, 7e-5 beside 2e-3. Below -126: 2^-126, which is as good as 0; the
// maximum's second operand is the one that stays NaN.
template <int DEGREE = 6>
inline vf exp2_vector(vf x) {
    const vf magic = broadcast(12582912.0f);
    x = maximum(broadcast(-126.0f), x);
    const vf shifted = x + magic;
    const vf f = x - (shifted - magic);
    vf p;
    if (DEGREE == 6) {
        p = broadcast(1.53458113e-4f);
        p = p * f + 1.33999312e-3f;
        p = p * f + 9.61848896e-3f;
        p = p * f + 5.55032878e-2f;
        p = p * f + 2.40226469e-1f;
        p = p * f + 6.93147206e-1f;
        p = p * f + 1.0f;
    } else {
        p = broadcast(5.51716685e-2f);
        p = p * f + 2.42611125e-1f;
        p = p * f + 6.93260968e-1f;
        p = p * f + 9.99928057e-1f;
    }
    return as_float(as_int(p) + (as_int(shifted) << 23));
}

// gelu(x) = max(x, 0) - |x| Phi(-|x|), with log2 Phi(-u) = -(1 + u p(u)). Exact: p of degree 8 fitted on [0, 12] for
// the absolute error of Phi; 2 Phi is an erf with error 9e-8, gelu's own is 4e-8. Else, for what is rounded to bfloat16
// or int8 next: degree 4, gelu off by 6e-4 of itself (1e-8 below -4.5).
template <bool EXACT = true>
inline vf gelu_vector(vf x) {
    const vf magnitude = as_float(as_int(x) & 0x7fffffff);
    const vf u = minimum(magnitude, broadcast(12.0f));
    vf p;
    if (EXACT) {
        p = broadcast(-2.2157618742943775e-07f);
        p = p * u + 5.771665396864559e-06f;
        p = p * u + -5.5087710392199326e-05f;
        p = p * u + 0.00022996773099381081f;
        p = p * u + 6.844772733307927e-05f;
        p = p * u + -0.007003145000773751f;
        p = p * u + 0.052467901730853105f;
        p = p * u + 0.4592143637497537f;
        p = p * u + 1.151104764451168f;
    } else {
        p = broadcast(0.00033751808223314583f);
        p = p * u + -0.006008062046021223f;
        p = p * u + 0.048924729228019714f;
        p = p * u + 0.46300208568573f;
        p = p * u + 1.1498945951461792f;
    }
    const vf tail = exp2_vector<EXACT ? 6 : 3>(-1.0f - u * p);
    const vf y = maximum(x, vf{}) - u * tail;
    return x == x ? y : x;  // NaN stays NaN
}

}  // namespace
}  // namespace NORMWEAR_ISA
}  // namespace normwear
