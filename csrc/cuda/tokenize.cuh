// tokenize's body. A thread block makes 64 tokens of one sequence, all `width` values of each:
//
//   1. the stretch of series it needs, and its two differences, into shared memory;
//   2. wavelets: a thread takes one token and one of the three series and keeps the 9 x 5 scalogram
//      values of that patch in registers while it runs over the taps; 45 products for each sample and
//      each 5 filter values it loads. The patches, transposed, go to shared memory: the scalogram
//      never leaves the multiprocessor;
//   3. patch projection, 96 outputs at a time, one 32 x 32 piece a warp, plus the template, into the
//      packed rows: in float32, or by TF32 tensor cores.
//
// 178 MFLOP a channel of 390 samples without the taps that are zero, five times less than one bank of
// patch filters convolved with the wavelets, and the tables are 160 KB for a length, not 38 MB.
//
// Tokens go by column of patches (5 scales), then row, so that the lanes of a warp read one filter and
// neighbouring rows: 9 samples apart, which is free of bank conflicts. Sequences of more than 64 rows
// of patches are cut into equal chunks of rows.
//
// Weights, (E, 135) in the order series, row, scale:
//   float32  [k of 135][E to a multiple of 32]
//   TF32     [E / 32][k / 8 of 17][2][lane][4]: a lane's B fragments of 4 tiles of 8 columns, rounded to
//            TF32; column n of tile j is output 8 (n / 2) + 2 j + n % 2 of the 32, so that a lane ends
//            with 8 neighbouring outputs.
#pragma once

#include "block.cuh"
#include "launch.h"

namespace normwear::cuda {

constexpr int patch_rows = 9, patch_scales = 5, series_count = 3;
constexpr int patch_size = patch_rows * patch_scales;    // of one series
constexpr int patch_values = series_count * patch_size;  // 135
constexpr int patch_steps = (patch_values + 7) / 8;      // of 8 values: 17
constexpr int tile_tokens = 64;
constexpr int tile_stride = tile_tokens + 8;  // no bank conflicts in the reads of either projection
constexpr int chunk_rows = 64;
constexpr int tokenize_threads = tile_tokens * series_count;
constexpr int tile_outputs = 32 * tokenize_threads / 64;  // 96: 2 x 3 warps
constexpr int tap_values = 8;

// Chunks of rows a sequence of `rows` rows of patches is cut into, and the tiles of one.
NORMWEAR_DEVICE int tokenize_chunks(int rows) { return (rows + chunk_rows - 1) / chunk_rows; }
NORMWEAR_DEVICE int tokenize_chunk_rows(int rows) {
    const int chunks = tokenize_chunks(rows);
    return (rows + chunks - 1) / chunks;
}
NORMWEAR_DEVICE int tokenize_chunk_tiles(int rows, int columns) {
    return (tokenize_chunk_rows(rows) * columns + tile_tokens - 1) / tile_tokens;
}

// Bytes of shared memory for `span` samples of each series.
constexpr std::int64_t tokenize_shared_bytes(std::int64_t span) {
    return 4 * (static_cast<std::int64_t>(patch_steps) * 8 * tile_stride + series_count * span);
}

// Where a thread block works.
struct Tile {
    int sequence, start, samples;  // of the series: samples after differencing
    int token, template_row, bank;
    int first_row, rows;  // of patches, of this chunk
    int first, count;     // tokens of this tile, by column then row of the chunk
    bool opens;           // writes the [CLS] row
};

NORMWEAR_DEVICE bool find_tile(const Tokenize& call, int block, Tile& tile) {
    tile.sequence = block / call.tiles;
    const int number = block % call.tiles;
    tile.start = call.cu_samples[tile.sequence];
    tile.samples = call.cu_samples[tile.sequence + 1] - tile.start - 2;
    tile.token = call.cu_tokens[tile.sequence];
    const int rows = (call.cu_tokens[tile.sequence + 1] - tile.token - 1) / call.columns;
    tile.template_row = call.sequences_at[2 * tile.sequence];
    tile.bank = call.sequences_at[2 * tile.sequence + 1];
    if (rows <= 0) return false;
    const int chunk_tiles = tokenize_chunk_tiles(rows, call.columns);
    const int per_chunk = tokenize_chunk_rows(rows);
    tile.first_row = number / chunk_tiles * per_chunk;
    tile.rows = rows - tile.first_row < per_chunk ? rows - tile.first_row : per_chunk;
    if (tile.rows <= 0) return false;
    tile.first = number % chunk_tiles * tile_tokens;
    const int left = tile.rows * call.columns - tile.first;
    tile.count = left < tile_tokens ? left : tile_tokens;
    tile.opens = number == 0;
    return tile.count > 0;
}

// The row of a token in the sequence; 0 is [CLS].
NORMWEAR_DEVICE int token_row(const Tile& tile, int columns, int member) {
    const int place = tile.first + member;
    const int column = place / tile.rows, row = place % tile.rows;
    return 1 + (tile.first_row + row) * columns + column;
}

// The 45 scalogram values of one token in one series, from samples in shared memory.
NORMWEAR_DEVICE void patch_wavelets(const Tokenize& call, const Tile& tile, const float* series,
                                    int member, float (&values)[patch_rows][patch_scales]) {
    const int place = tile.first + member;
    const int column = place / tile.rows, row = place % tile.rows;
    const std::int32_t* entry = call.bank_columns + 4 * (tile.bank * call.columns + column);
    const float* taps = call.bank_taps + static_cast<std::int64_t>(entry[0]) * tap_values;
    const float* sample = series + call.lead + patch_rows * row + entry[1];
    const int count = entry[2];  // a multiple of 9
    float window[patch_rows];
    NORMWEAR_UNROLL
    for (int i = 0; i < patch_rows; ++i) {
        window[i] = sample[i];
        NORMWEAR_UNROLL
        for (int j = 0; j < patch_scales; ++j) values[i][j] = 0;
    }
    for (int k = 0; k < count; k += patch_rows) {
        // The window slides by renaming: after 9 taps every sample is back in its register.
        NORMWEAR_UNROLL
        for (int u = 0; u < patch_rows; ++u) {
            Pack<float, 4> low;
            float filter[patch_scales];
            low.load(taps + (k + u) * tap_values);
            low.get(filter);
            filter[4] = taps[(k + u) * tap_values + 4];
            NORMWEAR_UNROLL
            for (int i = 0; i < patch_rows; ++i) {
                NORMWEAR_UNROLL
                for (int j = 0; j < patch_scales; ++j) {
                    values[i][j] += window[(u + i) % patch_rows] * filter[j];
                }
            }
            window[u] = sample[k + u + patch_rows];
        }
    }
}

// V outputs of a token: plus the template, into the packed row.
template <class Residual, int V>
NORMWEAR_DEVICE void store_outputs(const Tokenize& call, const Tile& tile, int row, int output,
                                   float* v) {
    Pack<float, V> constants;
    float c[V];
    constants.load(call.templates +
                   static_cast<std::int64_t>(tile.template_row + row) * call.width + output);
    constants.get(c);
    NORMWEAR_UNROLL
    for (int i = 0; i < V; ++i) v[i] += c[i];
    Pack<Residual, V> out;
    out.set(v);
    out.store(static_cast<Residual*>(call.residual) +
              static_cast<std::int64_t>(tile.token + row) * call.width + output);
}

template <class Residual, class Block>
NORMWEAR_DEVICE void project_float32(Block& block, const Tokenize& call, const Tile& tile,
                                     const float* patches) {
    struct Sums {
        float x[8][4];
    };
    const int padded = (call.width + 31) / 32 * 32;
    for (int first = 0; first < call.width; first += tile_outputs) {
        block.threads([&](int thread) {
            const int lane = thread % warp_size, warp = thread / warp_size;
            const int member = warp / 3 * 32 + lane / 8 * 8;
            const int output = first + warp % 3 * 32 + lane % 8 * 4;
            if (output >= call.width || member >= tile.count) return;
            Sums sums;
            NORMWEAR_UNROLL
            for (int i = 0; i < 8; ++i) {
                NORMWEAR_UNROLL
                for (int j = 0; j < 4; ++j) sums.x[i][j] = 0;
            }
            const float* weights = call.weights + output;
#ifdef __CUDACC__
#pragma unroll 3
#endif
            for (int k = 0; k < patch_values; ++k) {
                Pack<float, 8> left;
                Pack<float, 4> right;
                float a[8], b[4];
                left.load(patches + k * tile_stride + member);
                right.load(weights + static_cast<std::int64_t>(k) * padded);
                left.get(a);
                right.get(b);
                NORMWEAR_UNROLL
                for (int i = 0; i < 8; ++i) {
                    NORMWEAR_UNROLL
                    for (int j = 0; j < 4; ++j) sums.x[i][j] += a[i] * b[j];
                }
            }
            NORMWEAR_UNROLL
            for (int i = 0; i < 8; ++i) {
                if (member + i >= tile.count) continue;
                store_outputs<Residual, 4>(call, tile, token_row(tile, call.columns, member + i),
                                           output, sums.x[i]);
            }
        });
    }
}

struct MmaSums {
    static constexpr int rows = 2, columns = 4;
    float x[rows][columns][4];
};
struct MmaLeft {
    std::uint32_t x[2][4];
};
struct MmaRight {
    std::uint32_t x[4][2];
};

template <class Residual, class Block>
NORMWEAR_DEVICE void project_tf32(Block& block, const Tokenize& call, const Tile& tile,
                                  const float* patches) {
    const int pieces = (call.width + 31) / 32;
    for (int first = 0; first < pieces; first += tile_outputs / 32) {
        typename Block::template Each<MmaSums> sums;
        typename Block::template Each<MmaLeft> left;
        typename Block::template Each<MmaRight> right;
        block.threads([&](int thread) {
            NORMWEAR_UNROLL
            for (int i = 0; i < 2; ++i) {
                NORMWEAR_UNROLL
                for (int j = 0; j < 4; ++j) {
                    NORMWEAR_UNROLL
                    for (int k = 0; k < 4; ++k) sums[thread].x[i][j][k] = 0;
                }
            }
        });
#ifdef __CUDACC__
#pragma unroll 4  // all 17 steps at once spill on sm_80
#endif
        for (int step = 0; step < patch_steps; ++step) {
            block.threads([&](int thread) {
                const int lane = thread % warp_size, warp = thread / warp_size;
                int piece = first + warp % 3;
                // A warp beyond the width multiplies the last piece again and stores nothing.
                if (piece >= pieces) piece = pieces - 1;
                const float* weights =
                    call.weights + static_cast<std::int64_t>(piece * patch_steps + step) * 256;
                NORMWEAR_UNROLL
                for (int j = 0; j < 2; ++j) {
                    const Words4 pair =
                        *reinterpret_cast<const Words4*>(weights + j * 128 + lane * 4);
                    right[thread].x[2 * j][0] = pair.x;
                    right[thread].x[2 * j][1] = pair.y;
                    right[thread].x[2 * j + 1][0] = pair.z;
                    right[thread].x[2 * j + 1][1] = pair.w;
                }
                const float* column = patches + (step * 8 + lane % 4) * tile_stride +
                                      warp / 3 * 32 + lane / 4;
                NORMWEAR_UNROLL
                for (int i = 0; i < 2; ++i) {
                    left[thread].x[i][0] = float_bits(column[16 * i]);
                    left[thread].x[i][1] = float_bits(column[16 * i + 8]);
                    left[thread].x[i][2] = float_bits(column[16 * i + 4 * tile_stride]);
                    left[thread].x[i][3] = float_bits(column[16 * i + 4 * tile_stride + 8]);
                }
            });
            block.mma(sums, left, right);
        }
        block.threads([&](int thread) {
            const int lane = thread % warp_size, warp = thread / warp_size;
            const int output = (first + warp % 3) * 32 + lane % 4 * 8;
            if (output >= call.width) return;
            NORMWEAR_UNROLL
            for (int i = 0; i < 2; ++i) {
                NORMWEAR_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const int member = warp / 3 * 32 + 16 * i + 8 * half + lane / 4;
                    if (member >= tile.count) continue;
                    float v[8];
                    NORMWEAR_UNROLL
                    for (int j = 0; j < 4; ++j) {
                        v[2 * j] = sums[thread].x[i][j][2 * half];
                        v[2 * j + 1] = sums[thread].x[i][j][2 * half + 1];
                    }
                    store_outputs<Residual, 8>(call, tile, token_row(tile, call.columns, member),
                                               output, v);
                }
            }
        });
    }
}

template <class Residual, bool Tf32, class Block>
NORMWEAR_DEVICE void tokenize_body(Block& block, const Tokenize& call, float* shared) {
    Tile tile;
    if (!find_tile(call, block.index(), tile)) return;
    float* patches = shared;  // (136, tile_stride): the transposed patches
    float* series = shared + patch_steps * 8 * tile_stride;  // (3, span)

    block.each([&](int thread) {
        const float* x = call.series + tile.start;
        const int base = patch_rows * tile.first_row - call.lead;
        for (int i = thread; i < call.span; i += tokenize_threads) {
            const int n = base + i;
            float value = 0, first = 0, second = 0;
            if (n >= 0 && n < tile.samples) {
                // A difference of differences, in float32: the order decides the last bits.
                value = x[n + 2];
                first = value - x[n + 1];
                second = first - (x[n + 1] - x[n]);
            }
            series[i] = value;
            series[call.span + i] = first;
            series[2 * call.span + i] = second;
        }
        if (tile.opens) {
            for (int e = 4 * thread; e < call.width; e += 4 * tokenize_threads) {
                float v[4] = {0, 0, 0, 0};
                store_outputs<Residual, 4>(call, tile, 0, e, v);
            }
        }
    });

    block.each([&](int thread) {
        const int member = thread % tile_tokens, which = thread / tile_tokens;
        float values[patch_rows][patch_scales];
        if (member < tile.count) {
            patch_wavelets(call, tile, series + which * call.span, member, values);
        } else {
            NORMWEAR_UNROLL
            for (int i = 0; i < patch_rows; ++i) {
                NORMWEAR_UNROLL
                for (int j = 0; j < patch_scales; ++j) values[i][j] = 0;
            }
        }
        NORMWEAR_UNROLL
        for (int i = 0; i < patch_rows; ++i) {
            NORMWEAR_UNROLL
            for (int j = 0; j < patch_scales; ++j) {
                const int k = which * patch_size + i * patch_scales + j;
                patches[k * tile_stride + member] = Tf32 ? to_tf32(values[i][j]) : values[i][j];
            }
        }
        if (which == 0) {
            NORMWEAR_UNROLL
            for (int k = patch_values; k < 8 * patch_steps; ++k) {
                patches[k * tile_stride + member] = 0;
            }
        }
    });

    if constexpr (Tf32) {
        project_tf32<Residual>(block, call, tile, patches);
    } else {
        project_float32<Residual>(block, call, tile, patches);
    }
}

}  // namespace normwear::cuda
