// Linear layers and the MLP: a block of rows stays in cache from one product to the next.
#pragma once

#if defined(NORMWEAR_TILES)
#include "tile_products.h"
#else
#include "products.h"
#endif

namespace normwear {
namespace NORMWEAR_ISA {
namespace {

// Hidden units of an MLP tile: fc1's output of a block and its packed copy stay in the second cache.
constexpr int64_t HIDDEN = 768;

// Rows of a block: at most `limit`, the rows shared evenly between the threads.
int64_t block_rows(int64_t rows, int64_t limit, int threads) {
    const int64_t blocks = most(1, ceil_div(ceil_div(rows, limit), threads)) * threads;
    return least(limit, most(TALL, ceil_div(ceil_div(rows, blocks), TALL) * TALL));
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

// Rows first .. of the outputs panel_first .. panel_stop.
template <Operand OP>
void linear_job(const LinearArguments& p, int64_t first, int64_t rows, int64_t panel_first, int64_t panel_stop) {
    [[maybe_unused]] const Tiles tiles;
    const Packed& w = p.weight;
    const int64_t chunk = w.chunk;
    for (int64_t k = 0; k < w.k; k += chunk) {
        const Block block = new_block(PACKED, rows, packed_words<OP>(least(chunk, w.k - k)));
        pack_rows<OP>(block, p.a, first, k, least(chunk, w.k - k), p.standardise, p.carried, p.eps);
        const bool last = k + chunk >= w.k;
        product<OP>(block, w, k, k / chunk, panel_first, panel_stop,
                    {p.c, first, 0, last ? p.bias : nullptr, p.accumulate || k > 0, p.gelu && last});
    }
}

template <Operand OP>
void linear_operand(const LinearArguments& p, int threads) {
    const int64_t panels = p.weight.panels;
    const int64_t step = block_rows(p.rows, block_limit<OP>(), threads), blocks = ceil_div(p.rows, step);
    // Few rows (a fusion block): the threads share the outputs, and each packs the rows for itself.
    const int64_t parts = blocks >= threads ? 1 : least(panels, ceil_div(threads, most(1, blocks)));
    in_turn(blocks * parts, threads, [&](int64_t job) {
        const int64_t first = job / parts * step, part = job % parts;
        linear_job<OP>(p, first, least(step, p.rows - first), panels * part / parts, panels * (part + 1) / parts);
    });
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
void feed_job(const FeedArguments& p, int64_t first, int64_t rows) {
    [[maybe_unused]] const Tiles tiles;
    const int64_t width = p.proj.n, hidden = p.fc1.n;
    const View residual = {p.residual, width, Type::float32};
    const Output accumulate = {residual, first, 0, nullptr, true, false};
    const int64_t chunk = p.proj.chunk;
    for (int64_t k = 0; k < p.proj.k; k += chunk) {
        const Block block = new_block(PACKED, rows, packed_words<OP>(least(chunk, p.proj.k - k)));
        pack_rows<OP>(block, p.attended, first, k, least(chunk, p.proj.k - k), false, nullptr, 0);
        product<OP>(block, p.proj, k, k / chunk, 0, p.proj.panels, accumulate);
    }
    const Block normed = new_block(PACKED, rows, packed_words<OP>(width));
    pack_rows<OP>(normed, residual, first, 0, width, true, p.carried, p.eps);
    const int64_t units = OP == Operand::int8 ? p.fc2.chunk : HIDDEN;
    for (int64_t h = 0; h < hidden; h += units) {
        const Block activation = hidden_block<OP>(normed, p.fc1, p.fc1_bias, h, least(units, hidden - h));
        product<OP>(activation, p.fc2, h, h / p.fc2.chunk, 0, p.fc2.panels, accumulate);
    }
}

template <Operand OP>
void feed_operand(const FeedArguments& p, int threads) {
    const int64_t step = block_rows(p.rows, block_limit<OP>(), threads);
    in_turn(ceil_div(p.rows, step), threads,
            [&](int64_t job) { feed_job<OP>(p, job * step, least(step, p.rows - job * step)); });
}

void feed(const FeedArguments& p, int threads) {
    threads = cpu_team(threads, p.rows * p.fc1.n * p.fc1.k, 1 << 17);
    switch (p.proj.operand) {
        case Operand::float32: return feed_operand<Operand::float32>(p, threads);
        case Operand::bfloat16: return feed_operand<Operand::bfloat16>(p, threads);
        case Operand::int8: return feed_operand<Operand::int8>(p, threads);
    }
}

// A panel of outputs. A row of int8 that holds NaN or an infinity has the scale NaN, as an activation's.
void pack_panel(const float* weight, int64_t stride, uint32_t* out, float* scale, float* sums, const Packed& shape,
                int64_t panel) {
    const int64_t chunks = ceil_div(shape.k, shape.chunk), outputs = shape.panels * LANES;
    memset(out, 0, shape.words * LANES * 4);
    for (int64_t lane = 0; lane < LANES; ++lane) {
        const int64_t n = panel * LANES + lane;
        if (shape.operand == Operand::int8) {
            scale[n] = 0;
            for (int64_t c = 0; c < chunks; ++c) sums[c * outputs + n] = 0;
        }
        if (n >= shape.n) continue;
        const float* x = weight + n * stride;
        if (shape.operand == Operand::float32) {
            for (int64_t k = 0; k < shape.k; ++k) put_float32(out, k, shape.k, lane, x[k]);
        } else if (shape.operand == Operand::bfloat16) {
            for (int64_t k = 0; k < shape.k; ++k) put_bfloat16(out, k, lane, x[k]);
        } else {
            float largest = 0;
            bool finite = true;
            for (int64_t k = 0; k < shape.k; ++k) {
                largest = __builtin_fabsf(x[k]) > largest ? __builtin_fabsf(x[k]) : largest;
                finite = finite && x[k] - x[k] == 0;
            }
            scale[n] = finite ? largest / LARGEST_WEIGHT : __builtin_nanf("");
            const float inverse = scale[n] >= 1.17549435e-38f ? 1.0f / scale[n] : 0.0f;  // see quantise_row
            for (int64_t k = 0; finite && k < shape.k; ++k) {
                const int32_t q = static_cast<int32_t>(__builtin_rintf(x[k] * inverse));
                put_int8(out, k, lane, q);
                sums[k / shape.chunk * outputs + n] += static_cast<float>(q);
            }
            for (int64_t c = 0; c < chunks; ++c) sums[c * outputs + n] *= scale[n];
        }
    }
}

void pack(const float* weight, int64_t stride, uint32_t* data, float* scale, float* sums, const Packed& shape,
          int threads) {
    threads = cpu_team(threads, shape.n * shape.k, 1 << 15);
    evenly(shape.panels, threads, [&](int64_t panel) {
        pack_panel(weight, stride, data + panel * shape.words * LANES, scale, sums, shape, panel);
    });
}

}  // namespace
}  // namespace NORMWEAR_ISA
}  // namespace normwear
