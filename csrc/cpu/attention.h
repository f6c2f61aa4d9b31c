// Attention with the products of vector registers: queries lie in the lanes of both.
#pragma once

#include "heads.h"
#include "layers.h"

namespace normwear {
namespace NORMWEAR_ISA {
namespace {

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
            const int64_t key = (w + i) * Product<OP>::per_word;
            row[i] = own;
            for (int k = 0; k < Product<OP>::per_word; ++k) prefetch_row(kv, first + key + k, first + count - 1, column, d);
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
                const int64_t tile = (c + i) / TALL * TALL;
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
    const int64_t used = ceil_div(keys, Product<OP>::per_word);
    memset(x + used * LANES, 0, (words - used) * LANES * sizeof(float));
    for (int v = 0; v < NV; ++v) sums[v] = sum[0][v] + sum[1][v];
}

// One job a head, or a share of its queries. Both products have the queries in their lanes: a tile of
// keys times a panel of queries gives scores (keys, LANES), whose softmax runs down the keys without a
// step across lanes, and which are then, as they lie, the panel of the second product, values^T times
// scores. Only the result (d, LANES) is transposed.
template <Operand OP>
void attention_job(const AttentionArguments& p, int64_t parts, int64_t job) {
    const int64_t d = p.head_size, width = p.heads * d, words = packed_words<OP>(d);
    const Share share = share_of(p, job, parts, LANES);
    const int64_t q_first = share.query, q_stop = share.query_stop, first_key = share.key, count = share.keys;
    if (q_first >= q_stop) return;
    const int64_t key_words = packed_words<OP>(count);
    const Block keys = {static_cast<uint32_t*>(scratch(KEYS, Block::bytes(count, words))), nullptr, nullptr, count,
                        words};
    const Block values = {static_cast<uint32_t*>(scratch(VALUES, Block::bytes(d, key_words))), nullptr, nullptr, d,
                          key_words};
    pack_keys<OP>(p.key_value, first_key, share.head * d, d, keys);
    pack_values<OP>(p.key_value, first_key, count, width + share.head * d, values);
    // A tile may have a row more than there are keys, and words go in fours.
    float* scores = static_cast<float*>(scratch(SCORES, (count + 8) * LANES * sizeof(float)));
    uint32_t* queries = static_cast<uint32_t*>(scratch(PACKED, words * LANES * 4));
    const int64_t padded = ceil_div(d, 4) * 4;
    float* columns = static_cast<float*>(scratch(PACKED_HIDDEN, (padded + TALL) * LANES * sizeof(float)));
    float* rows = static_cast<float*>(scratch(ROW, LANES * padded * sizeof(float)));
    for (int64_t q = q_first; q < q_stop; q += LANES) {
        pack_queries<OP>(p.query, q, least(LANES, q_stop - q), share.head * d, d, words, queries);
        for (int64_t i = 0; i < LANES; ++i) {  // those of the next panel
            prefetch_row(p.query, q + LANES + i - AHEAD_ROWS, q_stop - 1, share.head * d, d);
        }
        for (int64_t i = 0; i < count; i += TALL) {
            multiply_tile<OP>(tile_rows(count - i), keys.tile(i), queries, words / 4, scores + i * LANES);
        }
        vf sums[NV];
        exponentials<OP>(scores, count, key_words, sums);
        for (int64_t c = 0; c < d; c += TALL) {
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
        out.data = static_cast<char*>(out.data) + share.head * d * size;
        for (int64_t i = 0; i < least(LANES, q_stop - q); ++i) write_row(out, q + i, d, rows + i * padded);
    }
}

}  // namespace
}  // namespace NORMWEAR_ISA
}  // namespace normwear
