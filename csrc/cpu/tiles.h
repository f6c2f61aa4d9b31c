// The tile unit of x86 processors (AMX) as functions: eight registers of 16 rows by 64 bytes, a load, a
// store and two products. Inline assembly, because the compiler's own forms do not tell it that a load
// reads memory. With NORMWEAR_EMULATE_TILES they are plain C++, for the sanitisers and for processors
// without the unit, with the processor's bits but for those of a NaN.
#pragma once

#include <stdint.h>
#include <string.h>

namespace normwear {
namespace NORMWEAR_ISA {
namespace {

#if !defined(NORMWEAR_EMULATE_TILES)

// All eight registers whole, for the life of a job: a thread that does not use them must not carry 8 KB of
// them through every context switch.
struct Tiles {
    Tiles() {
        struct alignas(64) {
            uint8_t palette, start_row, reserved[14];
            uint16_t bytes[16];
            uint8_t rows[16];
        } shape = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
        __asm__ volatile("ldtilecfg %0" ::"m"(shape));
    }
    ~Tiles() { __asm__ volatile("tilerelease" ::); }
};

template <int T>
inline void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void tile_load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
// The same past the first cache, which keeps what it holds.
template <int T>
inline void tile_stream(const void* from, int64_t stride) {
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
// C (16, 16) += A (16 rows, 32 values) times B (16 pairs of k, 16 outputs), bfloat16 into float32.
template <int C, int A, int B>
inline void tile_bfloat16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// C (16, 16) += A (16 rows, 64 of 0..255) times B (16 fours of k, 16 outputs of -128..127), in int32.
template <int C, int A, int B>
inline void tile_int8() {
    __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

struct Tile {
    uint32_t word[16][16];
};
inline Tile* tile_registers() {
    static thread_local Tile all[8];
    return all;
}

struct Tiles {
    Tiles() { memset(tile_registers(), 0, 8 * sizeof(Tile)); }
    ~Tiles() { memset(tile_registers(), 0xff, 8 * sizeof(Tile)); }  // NaN for whoever uses them outside a job
};

template <int T>
inline void tile_zero() {
    memset(tile_registers() + T, 0, sizeof(Tile));
}
template <int T>
inline void tile_load(const void* from, int64_t stride) {
    for (int i = 0; i < 16; ++i) memcpy(tile_registers()[T].word[i], static_cast<const char*>(from) + i * stride, 64);
}
template <int T>
inline void tile_stream(const void* from, int64_t stride) {
    tile_load<T>(from, stride);
}
template <int T>
inline void tile_store(void* to, int64_t stride) {
    for (int i = 0; i < 16; ++i) memcpy(static_cast<char*>(to) + i * stride, tile_registers()[T].word[i], 64);
}

// Subnormal values count as zero, as operands and after every operation.
inline float tile_float(uint32_t bits) {
    if (!(bits & 0x7f800000u)) bits &= 0x80000000u;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline float flushed(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return tile_float(bits);
}

template <int C, int A, int B>
inline void tile_bfloat16() {
    Tile* t = tile_registers();
    for (int m = 0; m < 16; ++m) {
        for (int n = 0; n < 16; ++n) {
            float even = 0, odd = 0;
            for (int k = 0; k < 16; ++k) {
                const uint32_t a = t[A].word[m][k], b = t[B].word[k][n];
                even = flushed(__builtin_fmaf(tile_float(a << 16), tile_float(b << 16), even));
                odd = flushed(__builtin_fmaf(tile_float(a & 0xffff0000u), tile_float(b & 0xffff0000u), odd));
            }
            const float c = flushed(tile_float(t[C].word[m][n]) + flushed(even + odd));
            memcpy(&t[C].word[m][n], &c, 4);
        }
    }
}
template <int C, int A, int B>
inline void tile_int8() {
    Tile* t = tile_registers();
    for (int m = 0; m < 16; ++m) {
        for (int n = 0; n < 16; ++n) {
            uint32_t sum = t[C].word[m][n];
            for (int k = 0; k < 64; ++k) {
                const uint32_t a = (t[A].word[m][k / 4] >> (8 * (k % 4))) & 255u;
                const int32_t b = static_cast<int8_t>(t[B].word[k / 4][n] >> (8 * (k % 4)));
                sum += static_cast<uint32_t>(static_cast<int32_t>(a) * b);
            }
            t[C].word[m][n] = sum;
        }
    }
}

#endif

}  // namespace
}  // namespace NORMWEAR_ISA
}  // namespace normwear
