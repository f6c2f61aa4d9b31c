// residual_norm's body: one warp a row up to 768 values, four warps a row above.
#pragma once

#include "block.cuh"
#include "launch.h"

namespace normwear::cuda {

constexpr int norm_threads = 128;

constexpr float float8_largest = 448.0f;

// The sum, or the largest, over the warps of each row.
template <int Warps, class Block, class Combine>
NORMWEAR_DEVICE void across_warps(Block& block, typename Block::template Each<float>& x,
                                  float* shared, Combine combine) {
    if constexpr (Warps > 1) {
        block.each([&](int thread) {
            if (thread % warp_size == 0) shared[thread / warp_size] = x[thread];
        });
        block.each([&](int thread) {
            const int first = thread / (Warps * warp_size) * Warps;
            float all = shared[first];
            NORMWEAR_UNROLL
            for (int i = 1; i < Warps; ++i) all = combine(all, shared[first + i]);
            x[thread] = all;
        });
    }
}

NORMWEAR_DEVICE float inverse_root(float x) {
#ifdef __CUDA_ARCH__
    return 1.0f / sqrtf(x);
#else
    return 1.0f / std::sqrt(x);
#endif
}

NORMWEAR_DEVICE float absolute(float x) { return x < 0 ? -x : x; }

// V values a load, Loads loads a thread, Warps warps a row.
template <class Block, class Residual, class Update, int V, int Loads, int Warps>
NORMWEAR_DEVICE void residual_norm_body(Block& block, const ResidualNorm& call, float* shared) {
    constexpr int row_threads = Warps * warp_size;
    constexpr int rows_a_block = norm_threads / row_threads;

    struct Row {
        float v[Loads][V];
    };
    typename Block::template Each<Row> row;
    typename Block::template Each<float> sum;
    typename Block::template Each<float> rstd;
    const int groups = call.width / V;

    const auto row_of = [&](int thread) {
        return static_cast<std::int64_t>(block.index()) * rows_a_block + thread / row_threads;
    };

    block.threads([&](int thread) {
        const std::int64_t r = row_of(thread);
        const bool inside = r < call.rows;
        Residual* residual = static_cast<Residual*>(call.residual) + r * call.width;
        const Update* update = static_cast<const Update*>(call.update);
        // All loads first, so that they are in flight together.
        Pack<Residual, V> old[Loads];
        Pack<Update, V> pending[Loads];
        NORMWEAR_UNROLL
        for (int i = 0; i < Loads; ++i) {
            const int group = thread % row_threads + i * row_threads;
            if (inside && group < groups) old[i].load(residual + group * V);
        }
        if (update != nullptr) {
            NORMWEAR_UNROLL
            for (int i = 0; i < Loads; ++i) {
                const int group = thread % row_threads + i * row_threads;
                if (inside && group < groups) pending[i].load(update + r * call.width + group * V);
            }
        }
        float total = 0;
        NORMWEAR_UNROLL
        for (int i = 0; i < Loads; ++i) {
            float* v = row[thread].v[i];
            const int group = thread % row_threads + i * row_threads;
            if (!inside || group >= groups) {
                NORMWEAR_UNROLL
                for (int k = 0; k < V; ++k) v[k] = 0;
                continue;
            }
            old[i].get(v);
            if (update != nullptr) {
                float u[V];
                pending[i].get(u);
                NORMWEAR_UNROLL
                for (int k = 0; k < V; ++k) v[k] += u[k];
                old[i].set(v);
                old[i].store(residual + group * V);
                old[i].get(v);  // the norm sees what was stored
            }
            if (call.carried != nullptr) {
                Pack<float, V> carried;
                float c[V];
                carried.load(call.carried + group * V);
                carried.get(c);
                NORMWEAR_UNROLL
                for (int k = 0; k < V; ++k) v[k] += c[k];
            }
            NORMWEAR_UNROLL
            for (int k = 0; k < V; ++k) total += v[k];
        }
        sum[thread] = total;
    });
    const auto plus = [](float a, float b) { return a + b; };
    block.warp_sum(sum);
    across_warps<Warps>(block, sum, shared, plus);

    // The squares of differences from the mean: values far from zero cost no digits.
    block.threads([&](int thread) {
        const float mean = sum[thread] / static_cast<float>(call.width);
        float total = 0;
        NORMWEAR_UNROLL
        for (int i = 0; i < Loads; ++i) {
            if (thread % row_threads + i * row_threads >= groups) continue;
            float* v = row[thread].v[i];
            NORMWEAR_UNROLL
            for (int k = 0; k < V; ++k) {
                v[k] -= mean;
                total += v[k] * v[k];
            }
        }
        sum[thread] = total;
    });
    block.warp_sum(sum);
    across_warps<Warps>(block, sum, shared, plus);
    block.threads([&](int thread) {
        rstd[thread] = inverse_root(sum[thread] / static_cast<float>(call.width) + call.eps);
    });

    if (call.out_type == type_float8) {
        block.threads([&](int thread) {
            float largest = 0;
            NORMWEAR_UNROLL
            for (int i = 0; i < Loads; ++i) {
                NORMWEAR_UNROLL
                for (int k = 0; k < V; ++k) {
                    const float size = absolute(row[thread].v[i][k]);
                    largest = size > largest ? size : largest;
                }
            }
            sum[thread] = largest;
        });
        block.warp_max(sum);
        across_warps<Warps>(block, sum, shared, [](float a, float b) { return a > b ? a : b; });
        block.threads([&](int thread) {
            const std::int64_t r = row_of(thread);
            if (r >= call.rows) return;
            const float largest = sum[thread] * rstd[thread];
            // A row of zeros is divided by one.
            const float scale = largest > 0 ? largest / float8_largest : 1.0f;
            if (thread % row_threads == 0) call.scale[r] = scale;
            const float factor = rstd[thread] / scale;
            NORMWEAR_UNROLL
            for (int i = 0; i < Loads; ++i) {
                const int group = thread % row_threads + i * row_threads;
                if (group >= groups) continue;
                float v[V];
                NORMWEAR_UNROLL
                for (int k = 0; k < V; ++k) v[k] = row[thread].v[i][k] * factor;
                store_float8<V>(static_cast<std::uint8_t*>(call.out) + r * call.width + group * V, v);
            }
        });
        return;
    }
    block.threads([&](int thread) {
        const std::int64_t r = row_of(thread);
        if (r >= call.rows) return;
        NORMWEAR_UNROLL
        for (int i = 0; i < Loads; ++i) {
            const int group = thread % row_threads + i * row_threads;
            if (group >= groups) continue;
            const std::int64_t at = r * call.width + group * V;
            float v[V];
            NORMWEAR_UNROLL
            for (int k = 0; k < V; ++k) v[k] = row[thread].v[i][k] * rstd[thread];
            if (call.out_type == type_bfloat16) {
                Pack<bfloat16, V> normed;
                normed.set(v);
                normed.store(static_cast<bfloat16*>(call.out) + at);
            } else {
                Pack<float, V> normed;
                normed.set(v);
                normed.store(static_cast<float*>(call.out) + at);
            }
        }
    });
}

// Calls run(shape) with the shape of kernel that a width takes.
template <int Values, int Count, int RowWarps>
struct NormShape {
    static constexpr int values = Values, loads = Count, warps = RowWarps;
    static constexpr int rows = norm_threads / (RowWarps * warp_size);
};

template <class Run>
void with_norm_shape(int width, Run run) {
    if (width % 8 != 0) return run(NormShape<4, 8, 4>{});
    if (width <= 768) return run(NormShape<8, 3, 1>{});
    return run(NormShape<8, 4, 4>{});
}

}  // namespace normwear::cuda
