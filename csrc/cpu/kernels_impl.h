// The CPU operators, compiled once for every instruction set: each kernels_*.cpp names its namespace
// and includes this file. Nothing of the standard library here: an inline function of it compiled for
// AVX-512 could be the copy the linker keeps for everybody.
#pragma once

#if defined(NORMWEAR_TILES)
#include "tile_attention.h"
#else
#include "attention.h"
#endif
#include "tokenize.h"

namespace normwear {
namespace NORMWEAR_ISA {
namespace {

template <Operand OP>
void attention_operand(const AttentionArguments& p, int threads) {
    const int64_t parts = shares_of_head(p, threads);
    in_turn(p.segments * p.heads * parts, threads, [&](int64_t job) { attention_job<OP>(p, parts, job); });
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
    evenly(p.rows, threads, [&](int64_t i) {
        float* row = static_cast<float*>(scratch(ROW, p.width * sizeof(float)));
        updated_row(p.residual + i * p.width, p.update, i, p.width, row);
        if (p.update.data) memcpy(p.residual + i * p.width, row, p.width * sizeof(float));
        standardise_row(row, p.carried, p.eps, p.width);
        write_row(p.out, i, p.width, row);
    });
}

void bias_gelu(View x, const float* bias, int64_t rows, int64_t width, int threads) {
    threads = cpu_team(threads, rows * width, 1 << 15);
    evenly(rows, threads, [&](int64_t i) {
        if (x.type == Type::float32) {
            bias_gelu_row(static_cast<float*>(x.data) + i * x.stride, bias, width);
        } else {
            float* row = static_cast<float*>(scratch(ROW, width * sizeof(float)));
            read_row(x, i, width, row);
            bias_gelu_row(row, bias, width);
            write_row(x, i, width, row);
        }
    });
}

void quantise(const QuantiseArguments& p, int threads) {
    threads = cpu_team(threads, p.rows * p.width, 1 << 15);
    evenly(p.rows, threads, [&](int64_t i) {
        float* row = static_cast<float*>(scratch(ROW, p.width * sizeof(float)));
        read_row(p.x, i, p.width, row);
        if (p.bias) bias_gelu_row(row, p.bias, p.width);
        quantise_row(row, p.width, p.out + i * p.width, p.scale + i, p.offset + i);
    });
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
    evenly(rows, threads, [&](int64_t i) {
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
    });
}

int64_t words(Operand operand, int64_t k) {
    switch (operand) {
        case Operand::float32: return packed_words<Operand::float32>(k);
        case Operand::bfloat16: return packed_words<Operand::bfloat16>(k);
        default: return packed_words<Operand::int8>(k);
    }
}

}  // namespace

const Kernels& table() {
    static constexpr Kernels all = {
        NORMWEAR_ISA_NAME, LANES, LARGEST_WEIGHT,
#if defined(__AVX512BF16__)
        true,
#else
        false,
#endif
        words, pack, linear, feed, attention, tokenize, residual_norm, bias_gelu, pool_norm, quantise};
    return all;
}

}  // namespace NORMWEAR_ISA
}  // namespace normwear
