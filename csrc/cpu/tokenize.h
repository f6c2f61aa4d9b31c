// The tokenizer: series to wavelets to patches, a block of patches in cache at a time.
#pragma once

#include "layers.h"

namespace normwear {
namespace NORMWEAR_ISA {
namespace {

// Five scales by RV vectors of rows are as many sums as the registers hold.
#if defined(__AVX512F__)
constexpr int RV = 5;
#else
constexpr int RV = 2;
#endif
constexpr int SCALES_AT_ONCE = 5;

// Taps first .. stop of filters; or, where they are the same from both ends, pairs first .. stop of a tap and its
// image, whose samples share a product: 30 instructions for ten instead of 50. `count` taps in all.
struct Taps {
    int64_t first, stop, count;
    bool even;
};

// y (S, RV * WIDTH): S filters of `scales` interleaved ones over R vectors of successive rows of a series.
template <int S, int R>
__attribute__((noinline)) void filter(const float* series, const float* taps, int64_t scales, const Taps& t, float* y) {
    vf acc[S][R] = {}, x[R];
    const auto add = [&](int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) {
            const float tap = taps[k * scales + s];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) acc[s][r] += tap * x[r];
        }
    };
    const auto alone = [&](int64_t first, int64_t stop) __attribute__((always_inline)) {
        for (int64_t k = first; k < stop; ++k) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) x[r] = load<vf>(series + k + r * WIDTH);
            add(k);
        }
    };
    if (!t.even) alone(t.first, t.stop);
    for (int64_t k = t.first; t.even && k < t.stop; ++k) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            x[r] = load<vf>(series + k + r * WIDTH) + load<vf>(series + t.count - 1 - k + r * WIDTH);
        }
        add(k);
    }
    if (t.even && t.count % 2) alone(t.count / 2, t.count / 2 + 1);
    for (int s = 0; s < S; ++s) {
        for (int r = 0; r < R; ++r) store(y + (s * RV + r) * WIDTH, acc[s][r]);
    }
}

template <int S, int R = RV>
void filter_rows(int64_t rows, const float* series, const float* taps, int64_t scales, const Taps& t, float* y) {
    if constexpr (R > 1) {
        if (rows <= (R - 1) * WIDTH) return filter_rows<S, R - 1>(rows, series, taps, scales, t, y);
    }
    filter<S, R>(series, taps, scales, t, y);
}

void filter_scales(int64_t count, int64_t rows, const float* series, const float* taps, int64_t scales, const Taps& t,
                   float* y) {
    switch (count) {
        case 1: return filter<1, RV>(series, taps, scales, t, y);
        case 2: return filter<2, RV>(series, taps, scales, t, y);
        case 3: return filter<3, RV>(series, taps, scales, t, y);
        case 4: return filter<4, RV>(series, taps, scales, t, y);
        default: return filter_rows<5>(rows, series, taps, scales, t, y);  // the released model's
    }
}

// Rows first .. stop of y (times * S, RV * WIDTH) to columns of rows at `out`, `step` values apart.
template <int S>
inline void scatter(const float* y, int64_t first, int64_t stop, float* out, int64_t step, int64_t times = 1) {
    for (int64_t j = first; j < stop; ++j, out += step) {
        for (int64_t i = 0; i < S * times; ++i) out[i] = y[i * RV * WIDTH + j];
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

// The tokens of a block of patches: tokens (rows, n) = block x weight^T + rows_template.
#if defined(NORMWEAR_TILES)

// The tokens of a pair of row tiles, one after another in memory, while the next pair is multiplied: in the order of
// the sums, 128 bytes of each of 32 rows, memory cannot keep up.
struct Tokens {
    const float *sums, *rows_template;
    float* tokens;
    int64_t width, rows, row, column;

    void some(int64_t count) {
        for (; count > 0 && row < rows; --count) {
            const float* x = sums_of(sums, row) + column / LANES * PAIR_SUMS;
            for (int v = 0; v < 2; ++v) {
                const int64_t at = row * width + column + 16 * v;
                const __mmask16 mask = first_lanes(width - column - 16 * v);
                const vf y = load<vf>(x + v * TILE_WORDS) + (vf)_mm512_maskz_loadu_ps(mask, rows_template + at);
                _mm512_mask_storeu_ps(tokens + at, mask, (__m512)y);
            }
            column += LANES;
            if (column >= width) column = 0, ++row;
        }
    }
};

void project(const Block& block, const Packed& w, const float* rows_template, float* tokens) {
    constexpr int64_t of_step = 16 * PARTS<Operand::float32>;
    const int64_t steps = block.words / of_step, tiles = ceil_div(block.rows, TALL);
    const bool rest = block.words % of_step > 0;
    float* sums = static_cast<float*>(scratch(SUMS, 2 * w.panels * PAIR_SUMS * sizeof(float)));
    Tokens done = {};
    // Evenly over a panel's 26 products; seven rows after every step were 9 % slower.
    Pace rows = {2 * TALL, PRODUCTS<Operand::float32> * steps + 2 * rest};
    const auto between = [&] { done.some(rows.due()); };
    for (int64_t tile = 0; tile < tiles; tile += 2) {
        const int64_t first = tile * TALL;
        float* own = sums + tile / 2 % 2 * w.panels * PAIR_SUMS;
        for (int64_t panel = 0; panel < w.panels; ++panel) {
            multiply_pair<Operand::float32>(tiles - tile, block.tile(first), TALL * block.words,
                                            w.data + panel * w.words * LANES, steps, own + panel * PAIR_SUMS, true,
                                            rest, between);
        }
        done.some(2 * TALL * w.panels);
        done = {own, rows_template + first * w.n, tokens + first * w.n, w.n, least(2 * TALL, block.rows - first), 0, 0};
    }
    done.some(2 * TALL * w.panels);
}

#else

void project(const Block& block, const Packed& w, const float* rows_template, float* tokens) {
    vf sums[TALL * NV];
    // A tile's rows are written whole before the next tile: templates and rows stream through once.
    for (int64_t first = 0; first < block.rows; first += TALL) {
        const int64_t m = least(TALL, block.rows - first);
        for (int64_t panel = 0; panel < w.panels; ++panel) {
            const int64_t column = panel * LANES, count = least(LANES, w.n - column);
            for (int64_t i = 0; i < m; ++i) {
                __builtin_prefetch(tokens + (first + i) * w.n + column, 1);
                __builtin_prefetch(rows_template + (first + i) * w.n + column);
            }
            multiply_tile<Operand::float32>(tile_rows(m), block.tile(first), w.data + panel * w.words * LANES, w.words / 4,
                                            sums);
            for (int64_t i = 0; i < m; ++i) {
                const int64_t at = (first + i) * w.n + column;
                if (count == LANES) {
                    for (int v = 0; v < NV; ++v) {
                        store(tokens + at + v * WIDTH, sums[NV * i + v] + load<vf>(rows_template + at + v * WIDTH));
                    }
                } else {
                    float row[LANES];
                    for (int v = 0; v < NV; ++v) store(row + v * WIDTH, sums[NV * i + v]);
                    for (int64_t j = 0; j < count; ++j) tokens[at + j] = row[j] + rows_template[at + j];
                }
            }
        }
    }
}

#endif

// A share of a sequence's rows of patches.
void tokenize_job(const TokenizeArguments& p, int64_t parts, int64_t job) {
    [[maybe_unused]] const Tiles tiles;
    const int64_t tile = RV * WIDTH, k_patch = p.weight.k, height = p.patch_rows, scales = p.patch_scales;
    const int64_t step = k_patch / height;  // values of one scalogram row of a patch
    const int64_t s = job / parts, part = job % parts, entry = p.table[s];
    const int64_t all = (p.tokens[s + 1] - p.tokens[s] - 1) / p.columns;
    const int64_t t_first = all * part / parts, t_count = all * (part + 1) / parts - t_first;
    const float* x = p.series + p.samples[s];
    const int64_t length = p.samples[s + 1] - p.samples[s], series = length - 2, padding = p.padding[entry];
    const float* rows_template = p.templates[entry];
    float* residual = p.residual + p.tokens[s] * p.width;
    if (part == 0) memcpy(residual, rows_template, p.width * sizeof(float));
    if (t_count == 0) return;

    const int64_t rows = t_count * p.columns, n_first = t_first * height, n_count = t_count * height;
    float* patches = static_cast<float*>(scratch(PATCHES, rows * k_patch * sizeof(float)));
    const Block block = new_block(PACKED, rows, packed_words<Operand::float32>(k_patch));
    void* bytes = scratch(BYTES, block.words * 4);
    int64_t last_tap = 0;
    for (int64_t f = 0; f < p.columns; ++f) last_tap = most(last_tap, p.spans[entry][4 * f + 1]);
    const int64_t reach = ceil_div(n_count, tile) * tile + last_tap;
    float* local = static_cast<float*>(scratch(SERIES, reach * sizeof(float)));
    float y[SCALES_AT_ONCE * RV * WIDTH];
    for (int order = 0; order < 3; ++order) {
        differences(x, length, order, n_first - padding, reach, local);
        for (int64_t f = 0; f < p.columns; ++f) {
            const int64_t* span = p.spans[entry] + 4 * f;
            for (int64_t r = 0; r < n_count; r += tile) {
                // Taps that meet samples, not only the zeros around them; 0 is the span's first. Zeros change no
                // bit of a sum, so that a row's value does not depend on the rows it is computed with.
                const int64_t n = n_first + r, taps_count = span[1] - span[0];
                Taps t = {most(0, padding - n - tile + 1 - span[0]), least(taps_count, series + padding - n - span[0]),
                          taps_count, span[3] != 0};
                if (t.even) {
                    const int64_t low = most(0, least(t.first, taps_count - t.stop));
                    t.stop = least(taps_count / 2, most(t.stop, taps_count - t.first));
                    t.first = low;
                }
                for (int64_t scale = 0; scale < scales; scale += SCALES_AT_ONCE) {
                    const int64_t count = least(SCALES_AT_ONCE, scales - scale);
                    filter_scales(count, n_count - r, local + r + span[0], p.taps[entry] + span[2] + scale, scales, t, y);
                    // Row r + j of the scalogram is row dt of patch t.
                    float* to = patches + f * k_patch + order * scales + scale;
                    int64_t t = r / height, dt = r % height;
                    for (int64_t j = 0, end; j < least(tile, n_count - r); j = end, dt = 0, ++t) {
                        end = least(j + height - dt, least(tile, n_count - r));
                        float* at = to + t * p.columns * k_patch + dt * step;
                        if (count == SCALES_AT_ONCE) scatter<SCALES_AT_ONCE>(y, j, end, at, step);
                        else scatter<1>(y, j, end, at, step, count);
                    }
                }
            }
        }
    }
    for (int64_t i = 0; i < rows; ++i) pack_row<Operand::float32>(block, i, patches + i * k_patch, k_patch, bytes);
    const int64_t token = (1 + t_first * p.columns) * p.width;
    project(block, p.weight, rows_template + token, residual + token);
}

void tokenize(const TokenizeArguments& p, int threads) {
    // Patch rows of a block: its scalogram, as the rows of the projection, is 400 KB at most.
    const int64_t fitting = most(1, (400 << 10) / (p.columns * p.weight.k * 4));
    int64_t longest = 0;
    for (int64_t s = 0; s < p.sequences; ++s) longest = most(longest, (p.tokens[s + 1] - p.tokens[s] - 1) / p.columns);
    threads = cpu_team(threads, p.tokens[p.sequences] * p.width, 1 << 13);
    const int64_t shares = threads > 1 ? ceil_div(4 * threads, p.sequences) : 1;
    const int64_t parts = most(1, least(longest, most(ceil_div(longest, fitting), shares)));
    in_turn(p.sequences * parts, threads, [&](int64_t job) { tokenize_job(p, parts, job); });
}

}  // namespace
}  // namespace NORMWEAR_ISA
}  // namespace normwear
