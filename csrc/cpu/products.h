// Matrix products in vector registers. A weight is packed once into panels of LANES outputs (NV vectors). A
// block of activation rows is packed into tiles of up to TALL rows, four 32-bit words of a row after the
// other. `multiply` keeps a TALL x LANES tile of sums in registers and per word does TALL broadcasts and
// TALL * NV multiply-adds. The sum over k of one output runs in order in one register lane, whatever the
// tile or the number of rows: a row's result depends on that row alone.
#pragma once

#include "block.h"

namespace normwear {
namespace NORMWEAR_ISA {
namespace {

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

constexpr int LARGEST_WEIGHT = Product<Operand::int8>::largest_weight;

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

// Rows of a tile whose `left` rows are still to come: TALL, or the smallest even count that holds the
// rest (1 for one), so that few rows do not pay for many.
inline int tile_rows(int64_t left) {
    if (left >= TALL) return TALL;
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

// 32-bit words of k values in a packed row or column.
template <Operand OP>
inline int64_t packed_words(int64_t k) {
    return ceil_div(ceil_div(k, Product<OP>::per_word), 4) * 4;
}

template <Operand>
inline int64_t block_limit() {
    return BLOCK;
}

struct Tiles {};  // nothing to prepare for a job

// Row `row` of a block from its words.
inline void pack_words(const Block& block, int64_t row, const uint32_t* source) {
    const int64_t first = row / TALL * TALL;
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
    vf bias[NV] = {}, x[TALL][NV];
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

// c (rows, n) (+)= block x weight^T, the block holding the weight's columns from k on.
template <Operand OP>
void product(const Block& block, const Packed& w, int64_t k, int64_t chunk, int64_t panel_first, int64_t panel_stop,
             const Output& o) {
    // Each tile fetches its share of the next panel: from the third cache its first tile would wait for it.
    const int64_t groups = block.words / 4, lines = ceil_div(LANES / 4, ceil_div(block.rows, TALL));
    typename Product<OP>::sum sums[TALL * NV];
    for (int64_t panel = panel_first; panel < panel_stop; ++panel) {
        const uint32_t* b = w.data + (panel * w.words + k / Product<OP>::per_word) * LANES;
        const int64_t column = panel * LANES, count = least(LANES, w.n - column);
        for (int64_t first = 0; first < block.rows; first += TALL) {
            const int64_t rows = least(TALL, block.rows - first);
            prefetch_tile(o.c, o.row + first, rows, o.column + column);
            const int64_t skipped = first / TALL * groups * lines * 64;
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

// fc1 and its gelu for the hidden units first .. first + count of a block, packed for fc2.
template <Operand OP>
Block hidden_block(const Block& normed, const Packed& fc1, const float* bias, int64_t first, int64_t count) {
    float* tile = static_cast<float*>(scratch(HIDDEN_ROWS, BLOCK * count * sizeof(float)));
    void* bytes = scratch(BYTES, count * 4 + 64);
    product<OP>(normed, fc1, 0, 0, first / LANES, ceil_div(first + count, LANES),
                {{tile, count, Type::float32}, 0, -first, bias, false, true});
    const Block activation = new_block(PACKED_HIDDEN, normed.rows, packed_words<OP>(count));
    for (int64_t i = 0; i < normed.rows; ++i) pack_row<OP>(activation, i, tile + i * count, count, bytes);
    return activation;
}

// Value k of output `lane` of a weight's panel.
inline void put_float32(uint32_t* panel, int64_t k, int64_t, int64_t lane, float x) {
    memcpy(panel + k * LANES + lane, &x, 4);
}
inline void put_bfloat16(uint32_t* panel, int64_t k, int64_t lane, float x) {
    panel[k / 2 * LANES + lane] |= static_cast<uint32_t>(to_bfloat16(x)) << (16 * (k % 2));
}
inline void put_int8(uint32_t* panel, int64_t k, int64_t lane, int32_t q) {
    panel[k / 4 * LANES + lane] |= (static_cast<uint32_t>(q) & 255u) << (8 * (k % 4));
}

}  // namespace
}  // namespace NORMWEAR_ISA
}  // namespace normwear
