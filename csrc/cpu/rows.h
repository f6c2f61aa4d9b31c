// Rows of activations: reading and writing them as float32, and what is done to a row in cache.
#pragma once

#include "vectors.h"

namespace normwear {
namespace NORMWEAR_ISA {
namespace {

// A row of any type as float32.
void read_row(const View& v, int64_t row, int64_t n, float* out) {
    int64_t i = 0;
    if (v.type == Type::float32) {
        memcpy(out, static_cast<const float*>(v.data) + row * v.stride, n * sizeof(float));
        return;
    }
    const uint16_t* x = static_cast<const uint16_t*>(v.data) + row * v.stride;
    for (; i + WIDTH <= n; i += WIDTH) store(out + i, load_bfloat16(x + i));
    for (; i < n; ++i) out[i] = from_bfloat16(x[i]);
}

void write_row(const View& v, int64_t row, int64_t n, const float* x) {
    int64_t i = 0;
    if (v.type == Type::float32) {
        memcpy(static_cast<float*>(v.data) + row * v.stride, x, n * sizeof(float));
        return;
    }
    uint16_t* out = static_cast<uint16_t*>(v.data) + row * v.stride;
    for (; i + WIDTH <= n; i += WIDTH) store_bfloat16(out + i, load<vf>(x + i));
    for (; i < n; ++i) out[i] = to_bfloat16(x[i]);
}

void bias_gelu_row(float* x, const float* bias, int64_t n) {
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) store(x + i, gelu_vector(load<vf>(x + i) + load<vf>(bias + i)));
    if (i < n) {
        float rest[WIDTH] = {};
        for (int64_t j = i; j < n; ++j) rest[j - i] = x[j] + bias[j];
        store(rest, gelu_vector(load<vf>(rest)));
        memcpy(x + i, rest, (n - i) * sizeof(float));
    }
}

// x = x (+ carried), to zero mean and unit variance; two passes over a row that is in the first cache.
void standardise_row(float* x, const float* carried, float eps, int64_t n) {
    vf sum[4] = {};
    float rest = 0;
    int64_t i = 0;
    for (; i + 4 * WIDTH <= n; i += 4 * WIDTH) {
        for (int j = 0; j < 4; ++j) {
            vf v = load<vf>(x + i + j * WIDTH);
            if (carried) store(x + i + j * WIDTH, v = v + load<vf>(carried + i + j * WIDTH));
            sum[j] += v;
        }
    }
    const int64_t whole = i;
    for (; i < n; ++i) {
        if (carried) x[i] += carried[i];
        rest += x[i];
    }
    const float mean = (sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest) / static_cast<float>(n);
    vf square[4] = {};
    rest = 0;
    for (i = 0; i < whole; i += 4 * WIDTH) {
        for (int j = 0; j < 4; ++j) {
            const vf d = load<vf>(x + i + j * WIDTH) - mean;
            square[j] += d * d;
        }
    }
    for (; i < n; ++i) rest += (x[i] - mean) * (x[i] - mean);
    const float variance =
        (sum_lanes((square[0] + square[1]) + (square[2] + square[3])) + rest) / static_cast<float>(n);
    const float inverse = 1.0f / __builtin_sqrtf(variance + eps);
    for (i = 0; i + WIDTH <= n; i += WIDTH) store(x + i, (load<vf>(x + i) - mean) * inverse);
    for (; i < n; ++i) x[i] = (x[i] - mean) * inverse;
}

// x ~ scale * q + offset with q in 0..255: the whole range of the row, affine. A row that holds NaN or an infinity,
// or whose range is one, has the scale and offset NaN: no product of it is finite.
void quantise_row(const float* x, int64_t n, uint8_t* q, float* scale, float* offset) {
    vf low[4], high[4];
    for (int j = 0; j < 4; ++j) low[j] = high[j] = broadcast(x[0]);
    int64_t i = 0;
    for (; i + 4 * WIDTH <= n; i += 4 * WIDTH) {
        for (int j = 0; j < 4; ++j) {
            const vf v = load<vf>(x + i + j * WIDTH);
            low[j] = minimum(low[j], v);
            high[j] = maximum(high[j], v);
        }
    }
    float smallest = -largest_lane(-minimum(minimum(low[0], low[1]), minimum(low[2], low[3])));
    float largest = largest_lane(maximum(maximum(high[0], high[1]), maximum(high[2], high[3])));
    for (int64_t j = i; j < n; ++j) {
        smallest = x[j] < smallest ? x[j] : smallest;
        largest = x[j] > largest ? x[j] : largest;
    }
    const float step = (largest - smallest) / 255.0f;
    // 1 / step of a subnormal step may be infinite; such a row is constant but for 2^-118.
    const float inverse = step >= 1.17549435e-38f ? 1.0f / step : 0.0f;
    const vf magic = broadcast(12582912.0f);  // its low byte is the nearest integer
    const auto put = [&](int64_t at) __attribute__((always_inline)) {
        const vf t = (load<vf>(x + at) - smallest) * inverse + magic;
        const vi v = as_int(t) - as_int(magic);
        // Compilers convert to bytes one by one.
#if defined(__AVX512F__)
        store(q + at, _mm512_cvtusepi32_epi8((__m512i)v));
#elif defined(__AVX2__)
        const __m256i words = _mm256_packus_epi32((__m256i)v, (__m256i)v), bytes = _mm256_packus_epi16(words, words);
        store(q + at, _mm256_extract_epi32(bytes, 0));
        store(q + at + 4, _mm256_extract_epi32(bytes, 4));
#else
        store(q + at, __builtin_convertvector((vu)(v > 255 ? vi{} + 255 : v), vb));
#endif
        return v;
    };
    // Minimum and maximum lose a NaN, but it comes out of `put` as more than eight bits, and so does an infinity, which
    // is 0 times infinity there. Two vectors at a time: or-ing three is one instruction.
    vi seen = {};
    for (i = 0; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
        const vi first = put(i), second = put(i + WIDTH);
        seen |= first | second;
    }
    for (; i + WIDTH <= n; i += WIDTH) seen |= put(i);
    bool finite = !any(seen & ~511);
    for (; i < n; ++i) {
        const float t = (x[i] - smallest) * inverse;
        const bool in_range = t >= 0 && t < 256;
        finite = finite && in_range;
        q[i] = static_cast<uint8_t>(!in_range ? 0 : t >= 254.5f ? 255 : __builtin_rintf(t));
    }
    *scale = finite ? step : __builtin_nanf("");
    *offset = finite ? smallest : __builtin_nanf("");
}

}  // namespace
}  // namespace NORMWEAR_ISA
}  // namespace normwear
