// What the products of all instruction sets share: blocks of packed rows, and what becomes of their sums.
#pragma once

#include "rows.h"

namespace normwear {
namespace NORMWEAR_ISA {
namespace {

enum Slot { PACKED, PACKED_HIDDEN, ROW, BYTES, HIDDEN_ROWS, SCALES, KEYS, VALUES, SCORES, SERIES, PATCHES, SUMS };

// Rows packed as a product reads them, tile after tile of TALL rows, with an affine scale a row for int8.
struct Block {
    uint32_t* data;
    float *scale, *offset;  // (rows,)
    int64_t rows, words;

    uint32_t* tile(int64_t row) const { return data + row * words; }
    static int64_t bytes(int64_t rows, int64_t words) { return (rows + TALL) * words * 4; }
};

Block new_block(int slot, int64_t rows, int64_t words) {
    constexpr int64_t most_rows = BLOCK + TALL;
    float* scales = static_cast<float*>(scratch(SCALES, 4 * most_rows * sizeof(float)));
    if (slot == PACKED_HIDDEN) scales += 2 * most_rows;
    return {static_cast<uint32_t*>(scratch(slot, Block::bytes(rows, words))), scales, scales + most_rows, rows, words};
}

// What becomes of the sums of a product.
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

}  // namespace
}  // namespace NORMWEAR_ISA
}  // namespace normwear
