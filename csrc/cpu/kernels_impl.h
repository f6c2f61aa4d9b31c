// The CPU operators, compiled once for every instruction set: each kernels_*.cpp names its namespace
// and includes this file. Nothing of the standard library here: an inline function of it compiled for
// AVX-512 could be the copy the linker keeps for everybody.
//
// Matrix products. A weight is packed once into panels of LANES outputs (NV vectors). A block of
// activation rows is packed into tiles of up to MR rows, four 32-bit words of a row after the other.
// `multiply` keeps an MR x LANES tile of sums in registers and per word does MR broadcasts and MR * NV
// multiply-adds. The sum over k of one output runs in order in one register lane, whatever the tile or
// the number of rows: a row's result depends on that row alone.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace normwear {
namespace NORMWEAR_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16, MR = 14, BLOCK = 84;
#elif defined(__AVX2__)
constexpr int WIDTH = 8, MR = 6, BLOCK = 96;
#else
constexpr int WIDTH = 4, MR = 6, BLOCK = 48;
#endif
constexpr int NV = 2;
constexpr int LANES = NV * WIDTH;

// Hidden units of an MLP tile: fc1's output of a block and its packed copy stay in the second cache.
constexpr int64_t HIDDEN = 768;

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
// NaN does not matter. (maskz: GCC warns about the plain one's undefined pass-through.)
#if defined(__AVX512F__)
inline vf maximum(vf a, vf b) { return (vf)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
inline vf minimum(vf a, vf b) { return (vf)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b); }
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

inline float value(const View& v, int64_t row, int64_t i) {
    return v.type == Type::float32 ? static_cast<const float*>(v.data)[row * v.stride + i]
                                   : from_bfloat16(static_cast<const uint16_t*>(v.data)[row * v.stride + i]);
}

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

// --- functions of a vector ---------------------------------------------------------------------------

// 2^x, relative error 1e-7: nearest integer by the 1.5 * 2^23 trick, minimax polynomial of degree 6 on
// [-1/2, 1/2] (error 1.9e-9), exponent added as an integer. Below -126: 2^-126, which is as good as 0.
inline vf exp2_vector(vf x) {
    const vf magic = broadcast(12582912.0f);
    x = maximum(x, broadcast(-126.0f));
    const vf shifted = x + magic;
    const vi n = as_int(shifted) - as_int(magic);
    const vf f = x - (shifted - magic);
    vf p = broadcast(1.53458113e-4f);
    p = p * f + 1.33999312e-3f;
    p = p * f + 9.61848896e-3f;
    p = p * f + 5.55032878e-2f;
    p = p * f + 2.40226469e-1f;
    p = p * f + 6.93147206e-1f;
    p = p * f + 1.0f;
    return as_float(as_int(p) + (n << 23));
}

// gelu(x) = max(x, 0) - |x| Phi(-|x|), with log2 Phi(-u) = -(1 + u p(u)), p of degree 8 fitted on
// [0, 12] for the absolute error of Phi: 2 Phi is an erf with error 9e-8, gelu's own is 4e-8.
inline vf gelu_vector(vf x) {
    const vf magnitude = as_float(as_int(x) & 0x7fffffff);
    const vf u = minimum(magnitude, broadcast(12.0f));
    vf p = broadcast(-2.2157618742943775e-07f);
    p = p * u + 5.771665396864559e-06f;
    p = p * u + -5.5087710392199326e-05f;
    p = p * u + 0.00022996773099381081f;
    p = p * u + 6.844772733307927e-05f;
    p = p * u + -0.007003145000773751f;
    p = p * u + 0.052467901730853105f;
    p = p * u + 0.4592143637497537f;
    p = p * u + 1.151104764451168f;
    const vf tail = exp2_vector(-1.0f - u * p);
    const vf y = maximum(x, vf{}) - u * tail;
    return x == x ? y : x;  // NaN stays NaN
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

// x ~ scale * q + offset with q in 0..255: the whole range of the row, affine.
void quantise_row(const float* x, int64_t n, uint8_t* q, float* scale, float* offset) {
    vf low = broadcast(x[0]), high = low;
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        const vf v = load<vf>(x + i);
        low = minimum(low, v);
        high = maximum(high, v);
    }
    float smallest = -largest_lane(-low), largest = largest_lane(high);
    for (int64_t j = i; j < n; ++j) {
        smallest = x[j] < smallest ? x[j] : smallest;
        largest = x[j] > largest ? x[j] : largest;
    }
    const float step = (largest - smallest) / 255.0f;
    const float inverse = step > 0 ? 1.0f / step : 0.0f;
    *scale = step;
    *offset = smallest;
    const vf magic = broadcast(12582912.0f);  // its low byte is the nearest integer
    for (i = 0; i + WIDTH <= n; i += WIDTH) {
        const vf t = (load<vf>(x + i) - smallest) * inverse + magic;
        vi v = as_int(t) - as_int(magic);
        v = v > 255 ? vi{} + 255 : v;
        store(q + i, __builtin_convertvector((vu)v, vb));
    }
    for (; i < n; ++i) {
        const float t = (x[i] - smallest) * inverse;
        q[i] = static_cast<uint8_t>(t >= 254.5f ? 255 : __builtin_rintf(t));
    }
}

// --- the product -------------------------------------------------------------------------------------

template <Operand>
struct Product;

template <>
struct Product<Operand::float32> {
    typedef vf sum;
    static constexpr int per_word = 1;
    static inline sum add(sum acc, uint32_t a, vu b) {
        float x;
        memcpy(&x, &a, 4);
        return acc + broadcast(x) * (vf)b;
    }
};

template <>
struct Product<Operand::bfloat16> {
    typedef vf sum;
    static constexpr int per_word = 2;
#if defined(__AVX512BF16__)
    static inline sum add(sum acc, uint32_t a, vu b) {
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
    }
#else
    static inline sum add(sum acc, uint32_t a, vu b) {
        float low, high;
        const uint32_t bits = a << 16, upper = a & 0xffff0000u;
        memcpy(&low, &bits, 4);
        memcpy(&high, &upper, 4);
        acc = acc + broadcast(low) * (vf)(b << 16);
        return acc + broadcast(high) * (vf)(b & 0xffff0000u);
    }
#endif
};

// Activations are 0..255. VNNI adds the four products of a word into 32 bits without saturating, so
// weights are -127..127; 3072 * 255 * 127 < 2^27. AVX2 adds pairs of products into 16 bits first and
// would saturate: weights are -63..63 there, 2 * 255 * 63 = 32130 < 32767.
template <>
struct Product<Operand::int8> {
    typedef vi sum;
    static constexpr int per_word = 4;
#if defined(__AVX512VNNI__)
    static constexpr int largest_weight = 127;
    static inline sum add(sum acc, uint32_t a, vu b) {
        return (vi)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32(static_cast<int>(a)), (__m512i)b);
    }
#elif defined(__AVX2__)
    static constexpr int largest_weight = 63;
    static inline sum add(sum acc, uint32_t a, vu b) {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(static_cast<int>(a)), (__m256i)b);
        return acc + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
#else
    static constexpr int largest_weight = 127;
    static inline sum add(sum acc, uint32_t a, vu b) {
        const vi w = (vi)b;
        const int32_t x = static_cast<int32_t>(a);
        acc += (x & 255) * ((w << 24) >> 24);
        acc += ((x >> 8) & 255) * ((w << 16) >> 24);
        acc += ((x >> 16) & 255) * ((w << 8) >> 24);
        return acc + (int32_t)(a >> 24) * (w >> 24);
    }
#endif
};

// What a product fetches into the second cache while it multiplies: `lines` cache lines a group of words.
struct Ahead {
    const char* at;
    int64_t lines;
};

// out (M, LANES), rows `stride` 32-bit words apart = a tile of M packed rows times one panel, over
// 4 * groups words.
template <Operand OP, int M>
__attribute__((noinline)) void multiply(const uint32_t* __restrict a, const uint32_t* __restrict b, int64_t groups,
                                        void* __restrict out, int64_t stride, Ahead ahead) {
    typename Product<OP>::sum acc[M][NV] = {};
    for (int64_t g = 0; g < groups; ++g) {
        for (int64_t line = 0; line < ahead.lines; ++line, ahead.at += 64) __builtin_prefetch(ahead.at, 0, 2);
#pragma GCC unroll 4
        for (int w = 0; w < 4; ++w) {
            const vu b0 = load<vu>(b + w * LANES), b1 = load<vu>(b + w * LANES + WIDTH);
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) {
                acc[i][0] = Product<OP>::add(acc[i][0], a[4 * i + w], b0);
                acc[i][1] = Product<OP>::add(acc[i][1], a[4 * i + w], b1);
            }
        }
        a += 4 * M;
        b += 4 * LANES;
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
        store(static_cast<uint32_t*>(out) + i * stride, acc[i][0]);
        store(static_cast<uint32_t*>(out) + i * stride + WIDTH, acc[i][1]);
    }
}

// Rows of a tile whose `left` rows are still to come: MR, or the smallest even count that holds the
// rest (1 for one), so that few rows do not pay for many.
inline int tile_rows(int64_t left) {
    if (left >= MR) return MR;
    return left == 1 ? 1 : static_cast<int>(left + (left & 1));
}

template <Operand OP>
inline void multiply_tile(int m, const uint32_t* a, const uint32_t* b, int64_t groups, void* out,
                          int64_t stride = LANES, Ahead ahead = {nullptr, 0}) {
    switch (m) {
        case 1: return multiply<OP, 1>(a, b, groups, out, stride, ahead);
        case 2: return multiply<OP, 2>(a, b, groups, out, stride, ahead);
        case 4: return multiply<OP, 4>(a, b, groups, out, stride, ahead);
        case 6: return multiply<OP, 6>(a, b, groups, out, stride, ahead);
#if defined(__AVX512F__)
        case 8: return multiply<OP, 8>(a, b, groups, out, stride, ahead);
        case 10: return multiply<OP, 10>(a, b, groups, out, stride, ahead);
        case 12: return multiply<OP, 12>(a, b, groups, out, stride, ahead);
        case 14: return multiply<OP, 14>(a, b, groups, out, stride, ahead);
#endif
    }
}

inline int per_word(Operand operand) {
    return operand == Operand::int8 ? 4 : operand == Operand::bfloat16 ? 2 : 1;
}

// Where a block of rows is packed, with an affine scale a row for int8.
struct Block {
    uint32_t* data;
    float *scale, *offset;  // (rows,)
    int64_t rows, words;

    uint32_t* tile(int64_t row) const { return data + row * words; }
    static int64_t bytes(int64_t rows, int64_t words) { return (rows + MR) * words * 4; }
};

// Row `row` of a block from its words.
inline void pack_words(const Block& block, int64_t row, const uint32_t* source) {
    const int64_t first = row / MR * MR;
    const int m = tile_rows(block.rows - first);
    uint32_t* out = block.tile(first) + 4 * (row - first);
    for (int64_t g = 0; g < block.words / 4; ++g) store(out + g * 4 * m, load<quad>(source + 4 * g));
}

// Row `row` of a block from float32 values; `bytes` is scratch of 4 * words bytes.
template <Operand OP>
void pack_row(const Block& block, int64_t row, const float* x, int64_t n, void* bytes) {
    const uint32_t* source = static_cast<const uint32_t*>(bytes);
    if (OP == Operand::float32) {
        if (n == block.words) {
            source = reinterpret_cast<const uint32_t*>(x);
        } else {
            memcpy(bytes, x, n * 4);
            memset(static_cast<char*>(bytes) + n * 4, 0, block.words * 4 - n * 4);
        }
    } else if (OP == Operand::bfloat16) {
        write_row({bytes, 0, Type::bfloat16}, 0, n, x);
        memset(static_cast<char*>(bytes) + n * 2, 0, block.words * 4 - n * 2);
    } else {
        quantise_row(x, n, static_cast<uint8_t*>(bytes), block.scale + row, block.offset + row);
        memset(static_cast<char*>(bytes) + n, 0, block.words * 4 - n);
    }
    pack_words(block, row, source);
}

// What becomes of a tile of sums.
struct Output {
    View c;
    int64_t row, column;  // of c where the block's first row and the weight's first output go
    const float* bias;
    bool accumulate, gelu;
};

inline vf finished(vf sums, const Block&, const Packed&, int64_t, int64_t, int64_t) { return sums; }
inline vf finished(vi sums, const Block& block, const Packed& w, int64_t chunk, int64_t row, int64_t column) {
    const vf x = __builtin_convertvector(sums, vf) * (block.scale[row] * load<vf>(w.scale + column));
    return x + block.offset[row] * load<vf>(w.sums + chunk * w.panels * LANES + column);
}

// Asks for the lines of c that a tile of sums goes to, so that they arrive while it is being summed.
inline void prefetch_tile(const View& c, int64_t row, int64_t rows, int64_t column) {
    const int64_t size = c.type == Type::float32 ? 4 : 2;
    for (int64_t i = 0; i < rows; ++i) {
        const char* at = static_cast<const char*>(c.data) + ((row + i) * c.stride + column) * size;
        for (int64_t byte = 0; byte < LANES * size; byte += 64) __builtin_prefetch(at + byte, 1);
    }
}

// A tile of sums of all LANES outputs to where it goes.
template <typename Sum>
inline void write_tile(const Sum* sums, const Block& block, const Packed& w, int64_t chunk, int64_t first, int64_t rows,
                       int64_t column, const Output& o) {
    vf bias[NV] = {}, x[MR][NV];
    for (int v = 0; v < NV && o.bias; ++v) bias[v] = load<vf>(o.bias + column + v * WIDTH);
    for (int64_t i = 0; i < rows; ++i) {
        for (int v = 0; v < NV; ++v) {
            x[i][v] = finished(sums[NV * i + v], block, w, chunk, first + i, column + v * WIDTH) + bias[v];
        }
    }
    if (o.gelu) {
        for (int64_t i = 0; i < rows; ++i) {
            for (int v = 0; v < NV; ++v) x[i][v] = gelu_vector(x[i][v]);
        }
    }
    const int64_t at = (o.row + first) * o.c.stride + o.column + column;
    if (o.c.type == Type::float32) {
        float* c = static_cast<float*>(o.c.data) + at;
        for (int64_t i = 0; i < rows; ++i, c += o.c.stride) {
            for (int v = 0; v < NV; ++v) {
                store(c + v * WIDTH, o.accumulate ? x[i][v] + load<vf>(c + v * WIDTH) : x[i][v]);
            }
        }
    } else {
        uint16_t* c = static_cast<uint16_t*>(o.c.data) + at;
        for (int64_t i = 0; i < rows; ++i, c += o.c.stride) {
            for (int v = 0; v < NV; ++v) {
                store_bfloat16(c + v * WIDTH, o.accumulate ? x[i][v] + load_bfloat16(c + v * WIDTH) : x[i][v]);
            }
        }
    }
}

// c (rows, n) (+)= block x weight^T over the words first .. first + block.words of the weight.
template <Operand OP>
void product(const Block& block, const Packed& w, int64_t first_word, int64_t chunk, int64_t panel_first,
             int64_t panel_stop, const Output& o) {
    // Each tile fetches its share of the next panel: from the third cache its first tile would wait for it.
    const int64_t groups = block.words / 4, lines = ceil_div(LANES / 4, ceil_div(block.rows, MR));
    typename Product<OP>::sum sums[MR * NV];
    for (int64_t panel = panel_first; panel < panel_stop; ++panel) {
        const uint32_t* b = w.data + (panel * w.words + first_word) * LANES;
        const int64_t column = panel * LANES, count = least(LANES, w.n - column);
        for (int64_t first = 0; first < block.rows; first += MR) {
            const int64_t rows = least(MR, block.rows - first);
            prefetch_tile(o.c, o.row + first, rows, o.column + column);
            const int64_t skipped = first / MR * groups * lines * 64;
            const bool ends = panel + 1 == panel_stop || skipped >= groups * LANES * 16;
            const char* next = reinterpret_cast<const char*>(b + w.words * LANES) + skipped;
            multiply_tile<OP>(tile_rows(rows), block.tile(first), b, groups, sums, LANES, {next, ends ? 0 : lines});
            if (count == LANES) {
                write_tile(sums, block, w, chunk, first, rows, column, o);
                continue;
            }
            for (int64_t i = 0; i < rows; ++i) {
                const int64_t at = (o.row + first + i) * o.c.stride + o.column + column;
                for (int v = 0; v < NV; ++v) {
                    vf x = finished(sums[NV * i + v], block, w, chunk, first + i, column + v * WIDTH);
                    float bias[WIDTH] = {}, rest[WIDTH];
                    const int64_t left = least(WIDTH, count - v * WIDTH);
                    if (left <= 0) break;
                    if (o.bias) memcpy(bias, o.bias + column + v * WIDTH, left * 4);
                    x += load<vf>(bias);
                    if (o.gelu) x = gelu_vector(x);
                    store(rest, x);
                    for (int64_t j = 0; j < left; ++j) {
                        if (o.c.type == Type::float32) {
                            float* c = static_cast<float*>(o.c.data) + at + v * WIDTH + j;
                            *c = o.accumulate ? *c + rest[j] : rest[j];
                        } else {
                            uint16_t* c = static_cast<uint16_t*>(o.c.data) + at + v * WIDTH + j;
                            *c = to_bfloat16(o.accumulate ? from_bfloat16(*c) + rest[j] : rest[j]);
                        }
                    }
                }
            }
        }
    }
}

enum Slot { PACKED, PACKED_HIDDEN, ROW, BYTES, HIDDEN_ROWS, SCALES, KEYS, VALUES, SCORES, SERIES, PATCHES };

Block new_block(int slot, int64_t rows, int64_t k, Operand operand) {
    const int64_t words = ceil_div(ceil_div(k, per_word(operand)), 4) * 4;
    float* scales = static_cast<float*>(scratch(SCALES, 4 * (BLOCK + MR) * sizeof(float)));
    if (slot == PACKED_HIDDEN) scales += 2 * (BLOCK + MR);
    return {static_cast<uint32_t*>(scratch(slot, Block::bytes(rows, words))), scales, scales + BLOCK + MR, rows, words};
}

// Rows of a block: at most BLOCK, the rows shared evenly between the threads.
int64_t block_rows(int64_t rows, int threads) {
    const int64_t blocks = ceil_div(ceil_div(rows, BLOCK), threads) * threads;
    return least(BLOCK, most(MR, ceil_div(ceil_div(rows, blocks), MR) * MR));
}

template <Operand OP>
void pack_rows(const Block& block, const View& a, int64_t first, int64_t column, int64_t k, bool standardise,
               const float* carried, float eps) {
    float* row = static_cast<float*>(scratch(ROW, (k + WIDTH) * sizeof(float)));
    void* bytes = scratch(BYTES, block.words * 4 + 64);
    View part = a;
    if (a.type == Type::float32) part.data = static_cast<float*>(a.data) + column;
    else part.data = static_cast<uint16_t*>(a.data) + column;
    for (int64_t i = 0; i < block.rows; ++i) {
        read_row(part, first + i, k, row);
        if (standardise) standardise_row(row, carried, eps, k);  // k is the whole row then
        pack_row<OP>(block, i, row, k, bytes);
    }
}

template <Operand OP>
void linear_operand(const LinearArguments& p, int threads) {
    const Packed& w = p.weight;
    const int64_t step = block_rows(p.rows, threads), blocks = ceil_div(p.rows, step);
    // Few rows (a fusion block): the threads share the outputs, and each packs the rows for itself.
    const int64_t parts = blocks >= threads ? 1 : least(w.panels, ceil_div(threads, blocks));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t job = 0; job < blocks * parts; ++job) {
        const int64_t first = job / parts * step, part = job % parts;
        const int64_t rows = least(step, p.rows - first), chunk = w.chunk;
        const int64_t panel_first = w.panels * part / parts, panel_stop = w.panels * (part + 1) / parts;
        for (int64_t k = 0; k < w.k; k += chunk) {
            const Block block = new_block(PACKED, rows, least(chunk, w.k - k), OP);
            pack_rows<OP>(block, p.a, first, k, least(chunk, w.k - k), p.standardise, p.carried, p.eps);
            const bool last = k + chunk >= w.k;
            product<OP>(block, w, k / per_word(OP), k / chunk, panel_first, panel_stop,
                        {p.c, first, 0, last ? p.bias : nullptr, p.accumulate || k > 0, p.gelu && last});
        }
    }
}

void linear(const LinearArguments& p, int threads) {
    threads = cpu_team(threads, p.rows * p.weight.n * p.weight.k, 1 << 17);
    switch (p.weight.operand) {
        case Operand::float32: return linear_operand<Operand::float32>(p, threads);
        case Operand::bfloat16: return linear_operand<Operand::bfloat16>(p, threads);
        case Operand::int8: return linear_operand<Operand::int8>(p, threads);
    }
}

template <Operand OP>
void feed_operand(const FeedArguments& p, int threads) {
    const int64_t width = p.proj.n, hidden = p.fc1.n;
    const int64_t step = block_rows(p.rows, threads), blocks = ceil_div(p.rows, step);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t job = 0; job < blocks; ++job) {
        const int64_t first = job * step, rows = least(step, p.rows - first);
        const View residual = {p.residual, width, Type::float32};
        const Output accumulate = {residual, first, 0, nullptr, true, false};
        const int64_t chunk = p.proj.chunk;
        for (int64_t k = 0; k < p.proj.k; k += chunk) {
            const Block block = new_block(PACKED, rows, least(chunk, p.proj.k - k), OP);
            pack_rows<OP>(block, p.attended, first, k, least(chunk, p.proj.k - k), false, nullptr, 0);
            product<OP>(block, p.proj, k / per_word(OP), k / chunk, 0, p.proj.panels, accumulate);
        }
        const Block normed = new_block(PACKED, rows, width, OP);
        pack_rows<OP>(normed, residual, first, 0, width, true, p.carried, p.eps);
        const int64_t units = OP == Operand::int8 ? p.fc2.chunk : HIDDEN;
        float* tile = static_cast<float*>(scratch(HIDDEN_ROWS, BLOCK * units * sizeof(float)));
        void* bytes = scratch(BYTES, units * 4 + 64);
        for (int64_t h = 0; h < hidden; h += units) {
            const int64_t count = least(units, hidden - h);
            const View c = {tile, count, Type::float32};
            product<OP>(normed, p.fc1, 0, 0, h / LANES, ceil_div(h + count, LANES), {c, 0, -h, p.fc1_bias, false, true});
            const Block activation = new_block(PACKED_HIDDEN, rows, count, OP);
            for (int64_t i = 0; i < rows; ++i) pack_row<OP>(activation, i, tile + i * count, count, bytes);
            product<OP>(activation, p.fc2, h / per_word(OP), h / p.fc2.chunk, 0, p.fc2.panels, accumulate);
        }
    }
}

void feed(const FeedArguments& p, int threads) {
    threads = cpu_team(threads, p.rows * p.fc1.n * p.fc1.k, 1 << 17);
    switch (p.proj.operand) {
        case Operand::float32: return feed_operand<Operand::float32>(p, threads);
        case Operand::bfloat16: return feed_operand<Operand::bfloat16>(p, threads);
        case Operand::int8: return feed_operand<Operand::int8>(p, threads);
    }
}

void pack(const float* weight, int64_t stride, uint32_t* data, float* scale, float* sums, const Packed& shape,
          int threads) {
    const int64_t step = per_word(shape.operand);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t panel = 0; panel < shape.panels; ++panel) {
        uint32_t* out = data + panel * shape.words * LANES;
        memset(out, 0, shape.words * LANES * 4);
        for (int64_t lane = 0; lane < LANES; ++lane) {
            const int64_t n = panel * LANES + lane;
            if (shape.operand == Operand::int8) {
                scale[n] = 0;
                for (int64_t c = 0; c < ceil_div(shape.k, shape.chunk); ++c) sums[c * shape.panels * LANES + n] = 0;
            }
            if (n >= shape.n) continue;
            const float* x = weight + n * stride;
            if (shape.operand == Operand::float32) {
                for (int64_t k = 0; k < shape.k; ++k) memcpy(out + k * LANES + lane, x + k, 4);
            } else if (shape.operand == Operand::bfloat16) {
                for (int64_t k = 0; k < shape.k; ++k) {
                    out[k / 2 * LANES + lane] |= static_cast<uint32_t>(to_bfloat16(x[k])) << (16 * (k % 2));
                }
            } else {
                float largest = 0;
                for (int64_t k = 0; k < shape.k; ++k) largest = __builtin_fabsf(x[k]) > largest ? __builtin_fabsf(x[k]) : largest;
                scale[n] = largest / Product<Operand::int8>::largest_weight;
                const float inverse = largest > 0 ? 1.0f / scale[n] : 0.0f;
                for (int64_t k = 0; k < shape.k; ++k) {
                    const int32_t q = static_cast<int32_t>(__builtin_rintf(x[k] * inverse));
                    out[k / step * LANES + lane] |= (static_cast<uint32_t>(q) & 255u) << (8 * (k % step));
                    sums[k / shape.chunk * shape.panels * LANES + n] += static_cast<float>(q);
                }
                for (int64_t c = 0; c < ceil_div(shape.k, shape.chunk); ++c) sums[c * shape.panels * LANES + n] *= scale[n];
            }
        }
    }
}

// --- attention ---------------------------------------------------------------------------------------

// `n` values of a row as words of the operand, padded with zeros to `words`; `temporary` is used where
// they cannot be read in place.
template <Operand OP>
const uint32_t* row_words(const View& v, int64_t row, int64_t column, int64_t n, int64_t words, uint32_t* temporary) {
    const bool same = (OP == Operand::float32) == (v.type == Type::float32);
    const int64_t size = v.type == Type::float32 ? 4 : 2, used = n * size;
    const char* x = static_cast<const char*>(v.data) + (row * v.stride + column) * size;
    if (same && used == words * 4) return reinterpret_cast<const uint32_t*>(x);
    memset(temporary, 0, words * 4);
    if (same) {
        memcpy(temporary, x, used);
    } else {
        View part = v;
        part.data = const_cast<char*>(x);
        read_row(part, 0, n, reinterpret_cast<float*>(temporary));
    }
    return temporary;
}

// Four by four words: column i of the rows becomes row i.
inline void transpose(quad& a, quad& b, quad& c, quad& e) {
    const quad ac0 = zip<0>(a, c), ac1 = zip<1>(a, c), be0 = zip<0>(b, e), be1 = zip<1>(b, e);
    a = zip<0>(ac0, be0);
    b = zip<1>(ac0, be0);
    c = zip<0>(ac1, be1);
    e = zip<1>(ac1, be1);
}

// Asks for a head's part of the row that is read AHEAD_ROWS later: rows are kilobytes apart, in pages of their
// own, where the processor does not look ahead by itself.
constexpr int64_t AHEAD_ROWS = 12;
inline void prefetch_row(const View& v, int64_t row, int64_t last, int64_t column, int64_t n) {
    const int64_t size = v.type == Type::float32 ? 4 : 2;
    const char* x = static_cast<const char*>(v.data) + (least(row + AHEAD_ROWS, last) * v.stride + column) * size;
    for (int64_t byte = 0; byte < n * size; byte += 64) __builtin_prefetch(x + byte);
}

// `count` <= LANES queries as the panel of a product: (words, LANES), zeros for those that are not there.
template <Operand OP>
void pack_queries(const View& query, int64_t first, int64_t count, int64_t column, int64_t d, int64_t words,
                  uint32_t* out) {
    uint32_t* temporary = static_cast<uint32_t*>(scratch(BYTES, 4 * words * 4));
    for (int64_t j = 0; j < LANES; j += 4) {
        const uint32_t* row[4];
        for (int i = 0; i < 4; ++i) {
            uint32_t* own = temporary + i * words;
            row[i] = own;
            if (j + i < count) row[i] = row_words<OP>(query, first + j + i, column, d, words, own);
            else memset(own, 0, words * 4);
        }
        for (int64_t w = 0; w < words; w += 4) {
            quad a = load<quad>(row[0] + w), b = load<quad>(row[1] + w);
            quad c = load<quad>(row[2] + w), e = load<quad>(row[3] + w);
            transpose(a, b, c, e);
            store(out + (w + 0) * LANES + j, a);
            store(out + (w + 1) * LANES + j, b);
            store(out + (w + 2) * LANES + j, c);
            store(out + (w + 3) * LANES + j, e);
        }
    }
}

// Keys (block.rows, d) as the rows of a product.
template <Operand OP>
void pack_keys(const View& kv, int64_t first, int64_t column, int64_t d, const Block& block) {
    uint32_t* temporary = static_cast<uint32_t*>(scratch(BYTES, block.words * 4));
    for (int64_t i = 0; i < block.rows; ++i) {
        prefetch_row(kv, first + i, first + block.rows - 1, column, d);
        pack_words(block, i, row_words<OP>(kv, first + i, column, d, block.words, temporary));
    }
}

// Values (count, d), transposed: the d = block.rows columns as the rows of a product over the keys.
template <Operand OP>
void pack_values(const View& kv, int64_t first, int64_t count, int64_t column, const Block& block) {
    const int64_t d = block.rows, padded = ceil_div(d, 4) * 4;
    uint32_t* words = static_cast<uint32_t*>(scratch(BYTES, 4 * padded * 4));
    for (int64_t w = 0; w < block.words; w += 4) {
        const uint32_t* row[4];
        for (int i = 0; i < 4; ++i) {
            uint32_t* own = words + i * padded;
            const int64_t key = (w + i) * per_word(OP);
            row[i] = own;
            for (int k = 0; k < per_word(OP); ++k) prefetch_row(kv, first + key + k, first + count - 1, column, d);
            if (OP == Operand::float32 && key < count) {
                row[i] = row_words<OP>(kv, first + key, column, d, padded, own);
                continue;
            }
            memset(own, 0, padded * 4);
            for (int half = 0; OP == Operand::bfloat16 && half < 2 && key + half < count; ++half) {
                const uint16_t* x = static_cast<const uint16_t*>(kv.data) + (first + key + half) * kv.stride + column;
                int64_t c = 0;
                for (; c + WIDTH <= d; c += WIDTH) {
                    const vu bits = __builtin_convertvector(load<vh>(x + c), vu);
                    store(own + c, load<vu>(own + c) | (bits << (16 * half)));
                }
                for (; c < d; ++c) own[c] |= static_cast<uint32_t>(x[c]) << (16 * half);
            }
        }
        for (int64_t c = 0; c < padded; c += 4) {
            quad q[4] = {load<quad>(row[0] + c), load<quad>(row[1] + c), load<quad>(row[2] + c), load<quad>(row[3] + c)};
            transpose(q[0], q[1], q[2], q[3]);
            for (int64_t i = 0; i < least(4, d - c); ++i) {
                const int64_t tile = (c + i) / MR * MR;
                store(block.tile(tile) + 4 * (w / 4 * tile_rows(d - tile) + c + i - tile), q[i]);
            }
        }
    }
}

// Scores (keys, LANES) to 2^(score - the column's largest), as the words (words, LANES) of a product, in
// place; zeros beyond the keys. Returns the columns' sums.
template <Operand OP>
void exponentials(float* x, int64_t keys, int64_t words, vf* sums) {
    vf top[NV], sum[2][NV] = {};
    for (int v = 0; v < NV; ++v) top[v] = load<vf>(x + v * WIDTH);
    for (int64_t i = 1; i < keys; ++i) {
        for (int v = 0; v < NV; ++v) top[v] = maximum(top[v], load<vf>(x + i * LANES + v * WIDTH));
    }
    for (int64_t i = 0; i < keys; i += 2) {
        vf e[2][NV];
        for (int j = 0; j < 2; ++j) {
            for (int v = 0; v < NV; ++v) {
                e[j][v] = i + j < keys ? exp2_vector(load<vf>(x + (i + j) * LANES + v * WIDTH) - top[v]) : vf{};
                sum[j][v] += e[j][v];
            }
        }
        for (int v = 0; v < NV; ++v) {
            if (OP == Operand::float32) {
                store(x + i * LANES + v * WIDTH, e[0][v]);
                if (i + 1 < keys) store(x + (i + 1) * LANES + v * WIDTH, e[1][v]);
            } else {
                store(x + i / 2 * LANES + v * WIDTH, rounded_bfloat16(e[0][v]) | (rounded_bfloat16(e[1][v]) << 16));
            }
        }
    }
    const int64_t used = ceil_div(keys, per_word(OP));
    memset(x + used * LANES, 0, (words - used) * LANES * sizeof(float));
    for (int v = 0; v < NV; ++v) sums[v] = sum[0][v] + sum[1][v];
}

// One job a head, or a share of its queries. Both products have the queries in their lanes: a tile of
// keys times a panel of queries gives scores (keys, LANES), whose softmax runs down the keys without a
// step across lanes, and which are then, as they lie, the panel of the second product, values^T times
// scores. Only the result (d, LANES) is transposed.
template <Operand OP>
void attention_operand(const AttentionArguments& p, int threads) {
    const int64_t d = p.head_size, width = p.heads * d;
    const int64_t words = ceil_div(ceil_div(d, per_word(OP)), 4) * 4;
    const int64_t heads = p.segments * p.heads;
    // Fewer heads than would keep the threads busy: each is cut by queries, and its keys packed again.
    const int64_t parts = heads >= 2 * threads ? 1 : ceil_div(2 * threads, heads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t job = 0; job < heads * parts; ++job) {
        const int64_t segment = job / (p.heads * parts), head = job / parts % p.heads, part = job % parts;
        const int64_t q_all = p.queries[segment + 1] - p.queries[segment];
        const int64_t panels = ceil_div(q_all, LANES);
        const int64_t q_first = p.queries[segment] + panels * part / parts * LANES;
        const int64_t q_stop = p.queries[segment] + least(q_all, panels * (part + 1) / parts * LANES);
        if (q_first >= q_stop) continue;
        const int64_t first_key = p.keys[segment], count = p.keys[segment + 1] - first_key;
        const int64_t key_words = ceil_div(ceil_div(count, per_word(OP)), 4) * 4;
        const Block keys = {static_cast<uint32_t*>(scratch(KEYS, Block::bytes(count, words))), nullptr, nullptr, count,
                            words};
        const Block values = {static_cast<uint32_t*>(scratch(VALUES, Block::bytes(d, key_words))), nullptr, nullptr, d,
                              key_words};
        pack_keys<OP>(p.key_value, first_key, head * d, d, keys);
        pack_values<OP>(p.key_value, first_key, count, width + head * d, values);
        // A tile may have a row more than there are keys, and words go in fours.
        float* scores = static_cast<float*>(scratch(SCORES, (count + 8) * LANES * sizeof(float)));
        uint32_t* queries = static_cast<uint32_t*>(scratch(PACKED, words * LANES * 4));
        const int64_t padded = ceil_div(d, 4) * 4;
        float* columns = static_cast<float*>(scratch(PACKED_HIDDEN, (padded + MR) * LANES * sizeof(float)));
        float* rows = static_cast<float*>(scratch(ROW, LANES * padded * sizeof(float)));
        for (int64_t q = q_first; q < q_stop; q += LANES) {
            pack_queries<OP>(p.query, q, least(LANES, q_stop - q), head * d, d, words, queries);
            for (int64_t i = 0; i < LANES; ++i) {  // those of the next panel
                prefetch_row(p.query, q + LANES + i - AHEAD_ROWS, q_stop - 1, head * d, d);
            }
            for (int64_t i = 0; i < count; i += MR) {
                multiply_tile<OP>(tile_rows(count - i), keys.tile(i), queries, words / 4, scores + i * LANES);
            }
            vf sums[NV];
            exponentials<OP>(scores, count, key_words, sums);
            for (int64_t c = 0; c < d; c += MR) {
                multiply_tile<OP>(tile_rows(d - c), values.tile(c), reinterpret_cast<uint32_t*>(scores), key_words / 4,
                                  columns + c * LANES);
            }
            for (int64_t c = 0; c < d; ++c) {
                for (int v = 0; v < NV; ++v) {
                    float* x = columns + c * LANES + v * WIDTH;
                    store(x, load<vf>(x) / sums[v]);
                }
            }
            for (int64_t c = 0; c < padded; c += 4) {
                for (int64_t j = 0; j < LANES; j += 4) {
                    const float* x = columns + c * LANES + j;
                    quad r[4] = {load<quad>(x), load<quad>(x + LANES), load<quad>(x + 2 * LANES), load<quad>(x + 3 * LANES)};
                    transpose(r[0], r[1], r[2], r[3]);
                    for (int i = 0; i < 4; ++i) store(rows + (j + i) * padded + c, r[i]);
                }
            }
            View out = p.out;
            const int64_t size = out.type == Type::float32 ? 4 : 2;
            out.data = static_cast<char*>(out.data) + head * d * size;
            for (int64_t i = 0; i < least(LANES, q_stop - q); ++i) write_row(out, q + i, d, rows + i * padded);
        }
    }
}

void attention(const AttentionArguments& p, int threads) {
    int64_t work = 0;
    for (int64_t i = 0; i < p.segments; ++i) {
        work += (p.queries[i + 1] - p.queries[i]) * (p.keys[i + 1] - p.keys[i]) * p.heads * p.head_size;
    }
    threads = cpu_team(threads, work, 1 << 17);
#if defined(__AVX512BF16__)
    if (p.query.type == Type::bfloat16) return attention_operand<Operand::bfloat16>(p, threads);
#endif
    attention_operand<Operand::float32>(p, threads);
}

// --- tokenizer ---------------------------------------------------------------------------------------

// Five scales by RV vectors of rows are as many sums as the registers hold.
#if defined(__AVX512F__)
constexpr int RV = 5;
#else
constexpr int RV = 2;
#endif
constexpr int SCALES_AT_ONCE = 5;

// y (S, RV * WIDTH): S filters of `scales` interleaved ones over successive rows of a series.
template <int S>
__attribute__((noinline)) void filter(const float* series, const float* taps, int64_t scales, int64_t count, float* y) {
    vf acc[S][RV] = {};
    for (int64_t k = 0; k < count; ++k) {
        vf x[RV];
#pragma GCC unroll 8
        for (int r = 0; r < RV; ++r) x[r] = load<vf>(series + k + r * WIDTH);
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) {
            const float tap = taps[k * scales + s];
#pragma GCC unroll 8
            for (int r = 0; r < RV; ++r) acc[s][r] += tap * x[r];
        }
    }
    for (int s = 0; s < S; ++s) {
        for (int r = 0; r < RV; ++r) store(y + (s * RV + r) * WIDTH, acc[s][r]);
    }
}

void filter_scales(int64_t count, const float* series, const float* taps, int64_t scales, int64_t length, float* y) {
    switch (count) {
        case 1: return filter<1>(series, taps, scales, length, y);
        case 2: return filter<2>(series, taps, scales, length, y);
        case 3: return filter<3>(series, taps, scales, length, y);
        case 4: return filter<4>(series, taps, scales, length, y);
        default: return filter<5>(series, taps, scales, length, y);
    }
}

// Differences of x (L,), of the given order, at first .. first + count of 0 .. L - 3; zeros outside.
void differences(const float* x, int64_t length, int order, int64_t first, int64_t count, float* out) {
    for (int64_t j = 0; j < count; ++j) {
        const int64_t n = first + j;
        if (n < 0 || n >= length - 2) {
            out[j] = 0;
        } else {
            const float newer = x[n + 2] - x[n + 1], older = x[n + 1] - x[n];
            out[j] = order == 0 ? x[n + 2] : order == 1 ? newer : newer - older;
        }
    }
}

void tokenize(const TokenizeArguments& p, int threads) {
    // Patch rows of a block: its scalogram, packed as the operand of the projection, is 400 KB at most.
    const int64_t tile = RV * WIDTH, words = p.weight.words, height = p.patch_rows, scales = p.patch_scales;
    const int64_t step = words / height;  // words of one scalogram row of a patch
    const int64_t fitting = most(1, (400 << 10) / (p.columns * words * 4));
    int64_t longest = 0;
    for (int64_t s = 0; s < p.sequences; ++s) longest = most(longest, (p.tokens[s + 1] - p.tokens[s] - 1) / p.columns);
    threads = cpu_team(threads, p.tokens[p.sequences] * p.width, 1 << 13);
    const int64_t shares = threads > 1 ? ceil_div(2 * threads, p.sequences) : 1;
    const int64_t parts = most(1, least(longest, most(ceil_div(longest, fitting), shares)));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t job = 0; job < p.sequences * parts; ++job) {
        const int64_t s = job / parts, part = job % parts, entry = p.table[s];
        const int64_t all = (p.tokens[s + 1] - p.tokens[s] - 1) / p.columns;
        const int64_t t_first = all * part / parts, t_count = all * (part + 1) / parts - t_first;
        const float* x = p.series + p.samples[s];
        const int64_t length = p.samples[s + 1] - p.samples[s], series = length - 2, padding = p.padding[entry];
        const float* rows_template = p.templates[entry];
        float* residual = p.residual + p.tokens[s] * p.width;
        if (part == 0) memcpy(residual, rows_template, p.width * sizeof(float));
        if (t_count == 0) continue;

        const int64_t rows = t_count * p.columns, n_first = t_first * height, n_count = t_count * height;
        const Block block = {static_cast<uint32_t*>(scratch(PATCHES, Block::bytes(rows, words))), nullptr, nullptr, rows,
                             words};
        if (step > 3 * scales) memset(block.data, 0, Block::bytes(rows, words));
        int64_t last_tap = 0;
        for (int64_t f = 0; f < p.columns; ++f) last_tap = most(last_tap, p.spans[entry][3 * f + 1]);
        const int64_t reach = ceil_div(n_count, tile) * tile + last_tap;
        float* local = static_cast<float*>(scratch(SERIES, reach * sizeof(float)));
        float y[SCALES_AT_ONCE * RV * WIDTH];
        for (int order = 0; order < 3; ++order) {
            differences(x, length, order, n_first - padding, reach, local);
            for (int64_t f = 0; f < p.columns; ++f) {
                const int64_t* span = p.spans[entry] + 3 * f;
                for (int64_t r = 0; r < n_count; r += tile) {
                    // Taps that meet samples, not only the zeros around them.
                    const int64_t n = n_first + r;
                    const int64_t k = most(span[0], padding - n - tile + 1);
                    const int64_t stop = least(span[1], series + padding - n);
                    for (int64_t scale = 0; scale < scales; scale += SCALES_AT_ONCE) {
                        const int64_t count = least(SCALES_AT_ONCE, scales - scale);
                        const float* taps = p.taps[entry] + span[2] + (k - span[0]) * scales + scale;
                        filter_scales(count, local + r + k, taps, scales, most(0, stop - k), y);
                        for (int64_t i = 0; i < count; ++i) {
                            int64_t t = r / height, dt = r % height;
                            uint32_t* at = nullptr;
                            int64_t stride = 0;
                            for (int64_t j = 0; j < least(tile, n_count - r); ++j) {
                                if (!at || dt == height) {
                                    if (at) dt = 0, ++t;
                                    const int64_t m = f * t_count + t, first = m / MR * MR;
                                    const int64_t tall = tile_rows(rows - first), word = order * scales + scale + i;
                                    at = block.tile(first) + 4 * (m - first) + word / 4 * 4 * tall + word % 4;
                                    stride = step * tall;
                                }
                                memcpy(at + dt * stride, y + i * tile + j, 4);
                                ++dt;
                            }
                        }
                    }
                }
            }
        }
        vf sums[MR * NV];
        // A tile's rows are written whole before the next tile: templates and rows stream through once.
        for (int64_t first = 0; first < rows; first += MR) {
            const int64_t m = least(MR, rows - first);
            int64_t start[MR];  // of each row's token, in the residual and in the template alike
            for (int64_t i = 0; i < m; ++i) {
                const int64_t f = (first + i) / t_count, t = t_first + (first + i) % t_count;
                start[i] = (1 + t * p.columns + f) * p.width;
            }
            for (int64_t panel = 0; panel < p.weight.panels; ++panel) {
                const int64_t column = panel * LANES, count = least(LANES, p.width - column);
                for (int64_t i = 0; i < m; ++i) {
                    __builtin_prefetch(residual + start[i] + column, 1);
                    __builtin_prefetch(rows_template + start[i] + column);
                }
                multiply_tile<Operand::float32>(tile_rows(m), block.tile(first), p.weight.data + panel * words * LANES,
                                                words / 4, sums);
                for (int64_t i = 0; i < m; ++i) {
                    const int64_t at = start[i] + column;
                    if (count == LANES) {
                        for (int v = 0; v < NV; ++v) {
                            store(residual + at + v * WIDTH, sums[NV * i + v] + load<vf>(rows_template + at + v * WIDTH));
                        }
                    } else {
                        float row[LANES];
                        for (int v = 0; v < NV; ++v) store(row + v * WIDTH, sums[NV * i + v]);
                        for (int64_t j = 0; j < count; ++j) residual[at + j] = row[j] + rows_template[at + j];
                    }
                }
            }
        }
    }
}

// --- row by row --------------------------------------------------------------------------------------

// A residual row with its pending update, as float32.
void updated_row(const float* residual, const View& update, int64_t row, int64_t n, float* out) {
    if (!update.data) {
        memcpy(out, residual, n * sizeof(float));
        return;
    }
    read_row(update, row, n, out);
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) store(out + i, load<vf>(out + i) + load<vf>(residual + i));
    for (; i < n; ++i) out[i] += residual[i];
}

void residual_norm(const NormArguments& p, int threads) {
    threads = cpu_team(threads, p.rows * p.width, 1 << 15);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < p.rows; ++i) {
        float* row = static_cast<float*>(scratch(ROW, p.width * sizeof(float)));
        updated_row(p.residual + i * p.width, p.update, i, p.width, row);
        if (p.update.data) memcpy(p.residual + i * p.width, row, p.width * sizeof(float));
        standardise_row(row, p.carried, p.eps, p.width);
        write_row(p.out, i, p.width, row);
    }
}

void bias_gelu(View x, const float* bias, int64_t rows, int64_t width, int threads) {
    threads = cpu_team(threads, rows * width, 1 << 15);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < rows; ++i) {
        if (x.type == Type::float32) {
            bias_gelu_row(static_cast<float*>(x.data) + i * x.stride, bias, width);
        } else {
            float* row = static_cast<float*>(scratch(ROW, width * sizeof(float)));
            read_row(x, i, width, row);
            bias_gelu_row(row, bias, width);
            write_row(x, i, width, row);
        }
    }
}

void quantise(const QuantiseArguments& p, int threads) {
    threads = cpu_team(threads, p.rows * p.width, 1 << 15);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < p.rows; ++i) {
        float* row = static_cast<float*>(scratch(ROW, p.width * sizeof(float)));
        read_row(p.x, i, p.width, row);
        if (p.bias) bias_gelu_row(row, p.bias, p.width);
        quantise_row(row, p.width, p.out + i * p.width, p.scale + i, p.offset + i);
    }
}

void normed_row(const PoolArguments& p, int64_t row, float* out) {
    updated_row(p.residual + row * p.width, p.update, row, p.width, out);
    standardise_row(out, p.carried, p.eps, p.width);
}

void scale_row(const PoolArguments& p, float* x) {
    int64_t i = 0;
    for (; i + WIDTH <= p.width; i += WIDTH) {
        store(x + i, load<vf>(x + i) * load<vf>(p.weight + i) + load<vf>(p.bias + i));
    }
    for (; i < p.width; ++i) x[i] = x[i] * p.weight[i] + p.bias[i];
}

void pool_norm(const PoolArguments& p, int threads) {
    const int64_t tokens = p.bounds[p.sequences], rows = p.pool == 2 ? tokens : p.sequences;
    threads = cpu_team(threads, (p.pool == 1 ? p.sequences : tokens) * p.width, 1 << 15);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < rows; ++i) {
        float* out = p.out + i * p.width;
        if (p.pool != 0) {
            normed_row(p, p.pool == 1 ? p.bounds[i] : i, out);
        } else {
            float* row = static_cast<float*>(scratch(ROW, p.width * sizeof(float)));
            memset(out, 0, p.width * sizeof(float));
            const int64_t count = p.bounds[i + 1] - p.bounds[i];
            for (int64_t r = p.bounds[i]; r < p.bounds[i + 1]; ++r) {
                normed_row(p, r, row);
                int64_t j = 0;
                for (; j + WIDTH <= p.width; j += WIDTH) store(out + j, load<vf>(out + j) + load<vf>(row + j));
                for (; j < p.width; ++j) out[j] += row[j];
            }
            const float share = 1.0f / static_cast<float>(count);
            for (int64_t j = 0; j < p.width; ++j) out[j] *= share;
        }
        scale_row(p, out);
    }
}

}  // namespace

const Kernels& table() {
    static constexpr Kernels all = {
        NORMWEAR_ISA_NAME, LANES, Product<Operand::int8>::largest_weight,
#if defined(__AVX512BF16__)
        true,
#else
        false,
#endif
        pack, linear, feed, attention, tokenize, residual_norm, bias_gelu, pool_norm, quantise};
    return all;
}

}  // namespace NORMWEAR_ISA
}  // namespace normwear
