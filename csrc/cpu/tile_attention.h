// Attention on the tile unit. Keys are packed once a head as the panels of the first product and values as those of
// the second; 32 queries at a time then pass through scores, softmax and the weighted sum. Scores lie as the tiles
// were stored, a panel of 32 keys after another; their powers of two are written as rows of the second product.
#pragma once

#include "heads.h"
#include "layers.h"

namespace normwear {
namespace NORMWEAR_ISA {
namespace {

constexpr int64_t STRIP = 2 * TALL;  // queries at a time
// Of 32 keys' scores; a cache line more than they take, or every panel of a row would fall on the same lines
// of the first cache.
constexpr int64_t SCORE_PANEL = PAIR_SUMS + 16;

// Values column .. column + n (n <= 32) of a row as one step of a tile's row, zeros after them.
template <Operand OP>
inline void row_step(const View& v, int64_t row, int64_t column, int64_t n, uint32_t* at) {
    const int64_t first = row * v.stride + column;
    if (OP == Operand::float32) {
        const float* x = static_cast<const float*>(v.data) + first;
        return store_step<OP>(at, (vf)_mm512_maskz_loadu_ps(first_lanes(n), x),
                              (vf)_mm512_maskz_loadu_ps(first_lanes(n - 16), x + 16));
    }
    const __mmask32 mask = n >= 32 ? 0xffffffffu : (1u << n) - 1;
    store(at, _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(v.data) + first));
}

// 16 x 16 words: column i of the rows becomes row i.
inline void transpose_tile(const uint32_t* from, uint32_t* to) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = load<__m512i>(from + 16 * i);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    }
    // r[4 b + c]: quarter q holds column 4 q + c of rows 4 b .. 4 b + 3.
    for (int c = 0; c < 4; ++c) {
        const __m512i low01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x44), low23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x44);
        const __m512i high01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xee), high23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xee);
        store(to + 16 * c, _mm512_shuffle_i32x4(low01, low23, 0x88));
        store(to + 16 * (4 + c), _mm512_shuffle_i32x4(low01, low23, 0xdd));
        store(to + 16 * (8 + c), _mm512_shuffle_i32x4(high01, high23, 0x88));
        store(to + 16 * (12 + c), _mm512_shuffle_i32x4(high01, high23, 0xdd));
    }
}

// Keys (count, d) as panels of outputs over the steps of d.
template <Operand OP>
void pack_keys(const View& kv, int64_t first, int64_t count, int64_t column, int64_t d, uint32_t* out) {
    alignas(64) uint32_t rows[PARTS<OP> * TILE_WORDS];
    for (int64_t panel = 0; panel < count; panel += LANES) {
        for (int64_t step = 0; step < d; step += 32, out += PARTS<OP> * 2 * TILE_WORDS) {
            for (int half = 0; half < 2; ++half) {
                for (int64_t i = 0; i < TALL; ++i) {
                    const int64_t key = panel + half * TALL + i;
                    if (key < count) row_step<OP>(kv, first + key, column + step, least(32, d - step), rows + 16 * i);
                    else for (int part = 0; part < PARTS<OP>; ++part) memset(rows + part * TILE_WORDS + 16 * i, 0, 64);
                }
                for (int part = 0; part < PARTS<OP>; ++part) {
                    transpose_tile(rows + part * TILE_WORDS, out + (2 * part + half) * TILE_WORDS);
                }
            }
        }
    }
}

// Values (count, d) as panels of outputs over the steps of keys.
template <Operand OP>
void pack_values(const View& kv, int64_t first, int64_t count, int64_t column, int64_t d, uint32_t* out) {
    for (int64_t c = 0; c < d; c += LANES) {
        for (int64_t step = 0; step < count; step += 32, out += PARTS<OP> * 2 * TILE_WORDS) {
            for (int half = 0; half < 2; ++half) {
                const __mmask16 mask = first_lanes(d - c - 16 * half);
                for (int64_t w = 0; w < 16; ++w) {
                    uint32_t* to = out + half * TILE_WORDS + 16 * w;
                    vf x[2];
                    for (int64_t i = 0; i < 2; ++i) {
                        const int64_t key = step + 2 * w + i, from = (first + key) * kv.stride + column + c + 16 * half;
                        const __mmask16 there = key < count ? mask : 0;
                        if (OP == Operand::float32) {
                            x[i] = (vf)_mm512_maskz_loadu_ps(there, static_cast<const float*>(kv.data) + from);
                        } else {
                            x[i] = widened(_mm256_maskz_loadu_epi16(there, static_cast<const uint16_t*>(kv.data) + from));
                        }
                    }
                    for (int part = 0; part < PARTS<OP>; ++part, to += 2 * TILE_WORDS) {
                        const __m256i even = (__m256i)_mm512_cvtneps_pbh((__m512)x[0]);
                        const __m256i odd = (__m256i)_mm512_cvtneps_pbh((__m512)x[1]);
                        store(to, (vu)_mm512_cvtepu16_epi32(even) | (vu)_mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
                        x[0] -= widened(even);
                        x[1] -= widened(odd);
                    }
                }
            }
        }
    }
}

// Scores of a strip to 2^(score - the row's largest), as rows of the second product, and one over each row's sum; some
// panels at a time, between the steps of other strips' products.
template <Operand OP>
class Softmax {
public:
    explicit Softmax(int64_t keys)
        : panels_(ceil_div(keys, LANES)), missing_(panels_ * LANES - keys),
          pieces_(ceil_div(panels_, SEARCHED) + ceil_div(panels_, RAISED)) {}

    int64_t pieces(int64_t rows) const { return rows * pieces_; }

    void start(float* scores, uint32_t* powers, float* shares, int64_t rows) {
        scores_ = scores, powers_ = powers, shares_ = shares, rows_ = rows, row_ = 0, panel_ = 0, found_ = false;
    }
    void some(int64_t pieces) {
        for (; pieces > 0 && row_ < rows_; --pieces) {
            if (found_) raise();
            else search();
        }
    }
    void all() { some(pieces(rows_)); }

private:
    static constexpr int64_t SEARCHED = 12, RAISED = OP == Operand::float32 ? 2 : 6;  // panels of a piece

    void search() {
        float* x = sums_of(scores_, row_);
        if (panel_ == 0) {
            if (missing_) {
                float* last = x + (panels_ - 1) * SCORE_PANEL;
                const __m512 never = _mm512_set1_ps(-__builtin_inff());
                _mm512_mask_storeu_ps(last, static_cast<__mmask16>(~first_lanes(LANES - missing_)), never);
                _mm512_mask_storeu_ps(last + TILE_WORDS, static_cast<__mmask16>(~first_lanes(16 - missing_)), never);
            }
            for (int v = 0; v < 2; ++v) kept_[v] = load<vf>(x + v * TILE_WORDS);
        }
        for (const int64_t stop = least(panel_ + SEARCHED, panels_); panel_ < stop; ++panel_) {
            for (int v = 0; v < 2; ++v) {
                kept_[v] = maximum(kept_[v], load<vf>(x + panel_ * SCORE_PANEL + v * TILE_WORDS));
            }
        }
        if (panel_ < panels_) return;
        largest_ = broadcast(_mm512_reduce_max_ps((__m512)maximum(kept_[0], kept_[1])));
        kept_[0] = kept_[1] = vf{};
        found_ = true, panel_ = 0;
    }
    void raise() {
        constexpr int DEGREE = OP == Operand::float32 ? 6 : 3;
        const float* x = sums_of(scores_, row_) + panel_ * SCORE_PANEL;
        uint32_t* to = powers_ + (row_ / TALL * panels_ + panel_) * TILE_WORDS * PARTS<OP> + row_ % TALL * 16;
        for (const int64_t stop = least(panel_ + RAISED, panels_); panel_ < stop; ++panel_) {
            const vf e0 = exp2_vector<DEGREE>(load<vf>(x) - largest_);
            const vf e1 = exp2_vector<DEGREE>(load<vf>(x + TILE_WORDS) - largest_);
            kept_[0] += e0;
            kept_[1] += e1;
            store_step<OP>(to, e0, e1);
            x += SCORE_PANEL, to += PARTS<OP> * TILE_WORDS;
        }
        if (panel_ < panels_) return;
        shares_[row_] = 1.0f / _mm512_reduce_add_ps((__m512)(kept_[0] + kept_[1]));
        found_ = false, panel_ = 0, ++row_;
    }

    const int64_t panels_, missing_, pieces_;
    float* scores_ = nullptr;
    uint32_t* powers_ = nullptr;
    float* shares_ = nullptr;
    int64_t rows_ = 0, row_ = 0, panel_ = 0;
    bool found_ = false;  // the row's largest
    vf kept_[2] = {}, largest_ = {};
};

// One job a head, or a share of its queries.
template <Operand OP>
void attention_job(const AttentionArguments& p, int64_t parts, int64_t job) {
    const int64_t d = p.head_size, width = p.heads * d, steps = ceil_div(d, 32);
    constexpr int64_t of_panel = PARTS<OP> * 2 * TILE_WORDS;
    [[maybe_unused]] const Tiles tiles;
    const Share share = share_of(p, job, parts, STRIP);
    const int64_t q_first = share.query, q_stop = share.query_stop, count = share.keys, column = share.head * d;
    if (q_first >= q_stop) return;
    const int64_t panels = ceil_div(count, LANES);
    uint32_t* keys = static_cast<uint32_t*>(scratch(KEYS, panels * steps * of_panel * 4));
    uint32_t* values = static_cast<uint32_t*>(scratch(VALUES, ceil_div(d, LANES) * panels * of_panel * 4));
    pack_keys<OP>(p.key_value, share.key, count, column, d, keys);
    pack_values<OP>(p.key_value, share.key, count, width + column, d, values);
    const int64_t query_tile = steps * PARTS<OP> * TILE_WORDS, power_tile = panels * PARTS<OP> * TILE_WORDS;
    uint32_t* queries = static_cast<uint32_t*>(scratch(PACKED, steps * of_panel * 4));
    float* scores = static_cast<float*>(scratch(SCORES, 2 * panels * SCORE_PANEL * sizeof(float)));
    uint32_t* powers = static_cast<uint32_t*>(scratch(PACKED_HIDDEN, 2 * panels * of_panel * 4));
    float* sums = static_cast<float*>(scratch(SUMS, PAIR_SUMS * sizeof(float)));
    float shares[2][STRIP];
    Softmax<OP> softmax(count);
    const int64_t times = (steps + ceil_div(d, LANES)) * panels * PRODUCTS<OP>;
    const int64_t pieces = ceil_div(softmax.pieces(STRIP), times);
    const auto between = [&] { softmax.some(pieces); };
    // Scores of strip s, softmax of the one before, output of the one before that.
    const int64_t mine = ceil_div(q_stop - q_first, STRIP);
    for (int64_t s = 0; s < mine + 2; ++s) {
        const auto rows_of = [&](int64_t strip) { return least(STRIP, q_stop - q_first - strip * STRIP); };
        const auto scores_of = [&](int64_t strip) { return scores + strip % 2 * panels * SCORE_PANEL; };
        const auto powers_of = [&](int64_t strip) { return powers + strip % 2 * panels * of_panel; };
        if (s > 0 && s <= mine) softmax.start(scores_of(s - 1), powers_of(s - 1), shares[(s - 1) % 2], rows_of(s - 1));
        if (s < mine) {
            const int64_t rows = rows_of(s);
            for (int64_t i = 0; i < rows; ++i) {
                for (int64_t step = 0; step < steps; ++step) {
                    row_step<OP>(p.query, q_first + s * STRIP + i, column + 32 * step, least(32, d - 32 * step),
                                 queries + i / TALL * query_tile + step * PARTS<OP> * TILE_WORDS + i % TALL * 16);
                }
            }
            for (int64_t panel = 0; panel < panels; ++panel) {
                multiply_pair<OP>(ceil_div(rows, TALL), queries, query_tile, keys + panel * steps * of_panel, steps,
                                  scores_of(s) + panel * SCORE_PANEL, true, false, between);
            }
        }
        for (int64_t c = 0; s >= 2 && c < d; c += LANES) {
            const int64_t rows = rows_of(s - 2), q = q_first + (s - 2) * STRIP;
            multiply_pair<OP>(ceil_div(rows, TALL), powers_of(s - 2), power_tile,
                              values + c / LANES * panels * of_panel, panels, sums, true, false, between);
            for (int64_t i = 0; i < rows; ++i) {
                const int64_t to = (q + i) * p.out.stride + column + c;
                for (int v = 0; v < 2; ++v) {
                    const __mmask16 mask = first_lanes(d - c - 16 * v);
                    const __m512 y = (__m512)(load<vf>(sums_of(sums, i) + v * TILE_WORDS) * shares[s % 2][i]);
                    if (p.out.type == Type::float32) {
                        _mm512_mask_storeu_ps(static_cast<float*>(p.out.data) + to + 16 * v, mask, y);
                    } else {
                        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p.out.data) + to + 16 * v, mask,
                                                 (__m256i)_mm512_cvtneps_pbh(y));
                    }
                }
            }
        }
        softmax.all();
    }
}

}  // namespace
}  // namespace NORMWEAR_ISA
}  // namespace normwear
