// How the kernels are written: a kernel's body is a template over a Block, which runs a function for
// every thread of a thread block. DeviceBlock is the GPU's; tests/cuda_emulation.cpp has one for the
// host, so that the same source, index arithmetic and shared memory included, is tested without a GPU.
//
//   Block::each(f)       f(thread) for every thread, then a barrier
//   Block::threads(f)    the same without the barrier
//   Block::Each<T>       a variable of which every thread has its own, addressed by thread
//   Block::index()       number of the thread block
//   Block::sync()        a barrier, after reading shared memory outside of `each`
//   Block::warp_sum(x)   every thread's x becomes the sum over its warp, by a butterfly
//   Block::warp_max(x)   likewise the largest
//   Block::add(p)        atomic increment of a counter in shared memory
//   Block::mma(c, a, b)  m16n8k8 products of TF32 values with float32 sums, as PTX lays them out
//
// What stands outside of `each` and `threads` is the same for all threads of the block.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define NORMWEAR_DEVICE __device__ __forceinline__
#define NORMWEAR_UNROLL _Pragma("unroll")
#else
#include <algorithm>
#include <cmath>
#define NORMWEAR_DEVICE inline
#define NORMWEAR_UNROLL
#endif

namespace normwear::cuda {

constexpr int warp_size = 32;

#ifdef __CUDACC__

struct DeviceBlock {
    template <class T>
    struct Each {
        T value;
        __device__ __forceinline__ T& operator[](int) { return value; }
    };

    __device__ __forceinline__ int index() const { return static_cast<int>(blockIdx.x); }
    __device__ __forceinline__ void sync() const { __syncthreads(); }

    template <class F>
    __device__ __forceinline__ void threads(F&& f) const {
        f(static_cast<int>(threadIdx.x));
    }

    template <class F>
    __device__ __forceinline__ void each(F&& f) const {
        f(static_cast<int>(threadIdx.x));
        __syncthreads();
    }

    __device__ __forceinline__ void warp_sum(Each<float>& x) const {
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) {
            x.value += __shfl_xor_sync(0xffffffffu, x.value, lanes);
        }
    }

    __device__ __forceinline__ void warp_max(Each<float>& x) const {
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) {
            x.value = fmaxf(x.value, __shfl_xor_sync(0xffffffffu, x.value, lanes));
        }
    }

    __device__ __forceinline__ void add(int* counter) const { atomicAdd(counter, 1); }

    template <class Sums, class Left, class Right>
    __device__ __forceinline__ void mma(Each<Sums>& c, Each<Left>& a, Each<Right>& b) const {
#pragma unroll
        for (int i = 0; i < Sums::rows; ++i) {
#pragma unroll
            for (int j = 0; j < Sums::columns; ++j) {
                float* s = c.value.x[i][j];
                const std::uint32_t* l = a.value.x[i];
                const std::uint32_t* r = b.value.x[j];
                asm(
                    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                    "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                    : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
                    : "r"(l[0]), "r"(l[1]), "r"(l[2]), "r"(l[3]), "r"(r[0]), "r"(r[1]));
            }
        }
    }
};

#endif

// --- Values in memory -------------------------------------------------------------------------------

#ifdef __CUDACC__
using Words4 = uint4;
using Words2 = uint2;
#else
struct alignas(16) Words4 {
    std::uint32_t x, y, z, w;
};
struct alignas(8) Words2 {
    std::uint32_t x, y;
};
#endif

NORMWEAR_DEVICE std::uint32_t float_bits(float x) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(x);
#else
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
#endif
}

NORMWEAR_DEVICE float bits_float(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
#endif
}

// To bfloat16, to nearest, ties to even; NaN stays NaN.
NORMWEAR_DEVICE std::uint32_t bfloat16_bits(float x) {
    const std::uint32_t bits = float_bits(x);
    if (x != x) return (bits >> 16) | 0x40u;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

// Two bfloat16 in a word, `low` at the lower address.
NORMWEAR_DEVICE std::uint32_t bfloat16_pair(float low, float high) {
#ifdef __CUDA_ARCH__
    std::uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return bfloat16_bits(low) | (bfloat16_bits(high) << 16);
#endif
}

// To float8 e4m3fn, to nearest, ties to even, beyond 448 saturated; NaN stays NaN.
NORMWEAR_DEVICE std::uint32_t float8_bits(float x) {
    const std::uint32_t bits = float_bits(x), sign = (bits >> 24) & 0x80u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | 0x7fu;
    if (magnitude < 0x3c800000u) {  // below 2^-6 the step is 2^-9: adding 2^14 rounds to it
        return sign | (float_bits(bits_float(magnitude) + 16384.0f) - 0x46800000u);
    }
    const std::uint32_t rounded = (magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
    const std::uint32_t value = rounded - (120u << 3);
    return sign | (value < 0x7eu ? value : 0x7eu);
}

NORMWEAR_DEVICE std::uint32_t float8_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    std::uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return float8_bits(low) | (float8_bits(high) << 8);
#endif
}

// To TF32, to nearest, ties away from zero.
NORMWEAR_DEVICE float to_tf32(float x) {
#ifdef __CUDA_ARCH__
    std::uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return __uint_as_float(bits);
#else
    const std::uint32_t bits = float_bits(x);
    return (bits & 0x7f800000u) == 0x7f800000u ? x : bits_float((bits + 0x1000u) & ~0x1fffu);
#endif
}

struct bfloat16 {
    std::uint16_t bits;
};

// V neighbouring values of type T, loaded and stored 16 bytes at a time (8 where that is all).
template <class T, int V>
struct Pack;

template <int V>
struct Pack<float, V> {
    static_assert(V % 4 == 0);
    Words4 words[V / 4];

    NORMWEAR_DEVICE void load(const float* p) {
        NORMWEAR_UNROLL
        for (int i = 0; i < V / 4; ++i) words[i] = reinterpret_cast<const Words4*>(p)[i];
    }
    NORMWEAR_DEVICE void store(float* p) const {
        NORMWEAR_UNROLL
        for (int i = 0; i < V / 4; ++i) reinterpret_cast<Words4*>(p)[i] = words[i];
    }
    NORMWEAR_DEVICE void get(float* v) const {
        NORMWEAR_UNROLL
        for (int i = 0; i < V / 4; ++i) {
            v[4 * i] = bits_float(words[i].x);
            v[4 * i + 1] = bits_float(words[i].y);
            v[4 * i + 2] = bits_float(words[i].z);
            v[4 * i + 3] = bits_float(words[i].w);
        }
    }
    NORMWEAR_DEVICE void set(const float* v) {
        NORMWEAR_UNROLL
        for (int i = 0; i < V / 4; ++i) {
            words[i].x = float_bits(v[4 * i]);
            words[i].y = float_bits(v[4 * i + 1]);
            words[i].z = float_bits(v[4 * i + 2]);
            words[i].w = float_bits(v[4 * i + 3]);
        }
    }
};

template <>
struct Pack<bfloat16, 4> {
    Words2 words;

    NORMWEAR_DEVICE void load(const bfloat16* p) { words = *reinterpret_cast<const Words2*>(p); }
    NORMWEAR_DEVICE void store(bfloat16* p) const { *reinterpret_cast<Words2*>(p) = words; }
    NORMWEAR_DEVICE void get(float* v) const {
        v[0] = bits_float(words.x << 16);
        v[1] = bits_float(words.x & 0xffff0000u);
        v[2] = bits_float(words.y << 16);
        v[3] = bits_float(words.y & 0xffff0000u);
    }
    NORMWEAR_DEVICE void set(const float* v) {
        words.x = bfloat16_pair(v[0], v[1]);
        words.y = bfloat16_pair(v[2], v[3]);
    }
};

template <>
struct Pack<bfloat16, 8> {
    Words4 words;

    NORMWEAR_DEVICE void load(const bfloat16* p) { words = *reinterpret_cast<const Words4*>(p); }
    NORMWEAR_DEVICE void store(bfloat16* p) const { *reinterpret_cast<Words4*>(p) = words; }
    NORMWEAR_DEVICE void get(float* v) const {
        const std::uint32_t w[4] = {words.x, words.y, words.z, words.w};
        NORMWEAR_UNROLL
        for (int i = 0; i < 4; ++i) {
            v[2 * i] = bits_float(w[i] << 16);
            v[2 * i + 1] = bits_float(w[i] & 0xffff0000u);
        }
    }
    NORMWEAR_DEVICE void set(const float* v) {
        words.x = bfloat16_pair(v[0], v[1]);
        words.y = bfloat16_pair(v[2], v[3]);
        words.z = bfloat16_pair(v[4], v[5]);
        words.w = bfloat16_pair(v[6], v[7]);
    }
};

// V values as float8 e4m3, stored at once.
template <int V>
NORMWEAR_DEVICE void store_float8(std::uint8_t* p, const float* v) {
    std::uint32_t words[V / 4];
    NORMWEAR_UNROLL
    for (int i = 0; i < V / 4; ++i) {
        words[i] = float8_pair(v[4 * i], v[4 * i + 1]) |
                   (float8_pair(v[4 * i + 2], v[4 * i + 3]) << 16);
    }
    if constexpr (V == 8) {
        *reinterpret_cast<Words2*>(p) = Words2{words[0], words[1]};
    } else {
        *reinterpret_cast<std::uint32_t*>(p) = words[0];
    }
}

}  // namespace normwear::cuda
