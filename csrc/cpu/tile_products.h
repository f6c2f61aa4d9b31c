// Matrix products on the tile unit (AMX). A row of a tile is 64 bytes of k, a step: 32 bfloat16 or 64 int8.
// Weights are packed into panels of LANES outputs, two tiles a step; a block's rows into tiles of TALL rows,
// one a step. Two by two tiles are summed at once, four loads for four products.
//
// float32 values are three bfloat16, x = h + m + l exactly: h is x rounded, m the rest rounded, l what is
// left (3 x 8 bits of significand and signs). Of the nine products of parts hh, hm, mh, mm, hl and lh are added;
// ml, lm and ll are below 2^-23 of the product together and of either sign. Each part's product is exact in float32, and
// a step's 32 are summed before they meet the sum, so the error is that of float32 arithmetic, or smaller.
// At the ends of the range: from 3.396e38 on h is infinite, m its difference to x, infinite too or NaN, and the sum NaN,
// where float32's own product of an infinity would be infinite; never is it finite. The unit counts subnormal values as
// zero, parts too, so values below 2^-103 lose their last bits.
//
// Of k, 1 to 8 values past whole steps are a short step of two products: their parts lie side by side, [m m h h]
// to meet [m h m h] and [h l] to meet [l h]; the unit adds them from the left, the small ones first. The released
// tokenizer's 135 values take 26 products instead of 30.
//
// The sum over k of one output runs in the same order whatever the block: a row's result depends on that row.
#pragma once

#include "block.h"
#include "tiles.h"

namespace normwear {
namespace NORMWEAR_ISA {
namespace {

constexpr int LARGEST_WEIGHT = 127;  // 3072 products of 255 * 127 stay below 2^27, added in 32 bits

template <Operand OP>
constexpr int64_t PARTS = OP == Operand::float32 ? 3 : 1;
template <Operand OP>
constexpr int64_t PER_STEP = OP == Operand::int8 ? 64 : 32;  // values of k
constexpr int64_t TILE_WORDS = TALL * 16;

// Steps whose share of a weight's panel is kept in the first cache (24 of 48 KB) while the block's rows stream by
// from the second; all of k at once reads both from there and runs at 0.7 of the rate. float32 does three to six
// times the work on a loaded tile and need not care.
template <Operand OP>
constexpr int64_t STEPS_AT_ONCE = OP == Operand::float32 ? int64_t{1} << 60 : 12;

// Rows of a block. A block reads all weights once from the third cache, at 17 GB/s 0.12 ns a bfloat16 weight,
// and computes 2 FLOPs a row and weight meanwhile; the block and the residual's rows fill the second cache.
template <Operand OP>
inline int64_t block_limit() {
    return OP == Operand::float32 ? BLOCK / 2 : BLOCK;
}

// What is past k's whole steps as a short one.
constexpr int64_t SHORT = 8, SHORT_WORDS = 32;
template <Operand OP>
inline bool has_short_step(int64_t k) {
    return OP == Operand::float32 && k % 32 > 0 && k % 32 <= SHORT;
}

template <Operand OP>
inline int64_t packed_words(int64_t k) {
    constexpr int64_t of_step = 16 * PARTS<OP>;
    return has_short_step<OP>(k) ? k / 32 * of_step + SHORT_WORDS : ceil_div(k, PER_STEP<OP>) * of_step;
}

inline __mmask16 first_lanes(int64_t count) {
    return static_cast<__mmask16>(count >= 16 ? 0xffff : count > 0 ? (1 << count) - 1 : 0);
}

inline vf widened(__m256i x) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }

// 32 values of a row into a step of its tile, a part after another.
template <Operand OP>
inline void store_step(uint32_t* at, vf x0, vf x1) {
    for (int part = 0; part < PARTS<OP>; ++part, at += TILE_WORDS) {
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)x1, (__m512)x0);
        store(at, both);
        x0 -= widened(_mm512_castsi512_si256(both));
        x1 -= widened(_mm512_extracti64x4_epi64(both, 1));
    }
}

// SHORT values of a row, the rest of x zero, into a short step.
inline void store_short_step(uint32_t* at, vf x) {
    __m128i part[3];
    for (int i = 0; i < 3; ++i) {
        const __m256i both = (__m256i)_mm512_cvtneps_pbh((__m512)x);
        part[i] = _mm256_castsi256_si128(both);
        x -= widened(both);
    }
    const __m256i high = _mm256_broadcastsi128_si256(part[0]), middle = _mm256_broadcastsi128_si256(part[1]);
    store(at, _mm512_inserti64x4(_mm512_castsi256_si512(middle), high, 1));
    store(at + TILE_WORDS, _mm512_zextsi256_si512(_mm256_inserti128_si256(high, part[2], 1)));
}

// Values 32 * step .. of row `row` of a block.
template <Operand OP>
inline void store_step_of(const Block& block, int64_t row, int64_t step, vf x0, vf x1) {
    uint32_t* at = block.tile(row / TALL * TALL) + step * PARTS<OP> * TILE_WORDS + row % TALL * 16;
    if (OP == Operand::float32 && block.words - step * PARTS<OP> * 16 == SHORT_WORDS) store_short_step(at, x0);
    else store_step<OP>(at, x0, x1);
}

// Row `row` of a block from float32 values; `bytes` is scratch for a row of int8.
template <Operand OP>
void pack_row(const Block& block, int64_t row, const float* x, int64_t n, void* bytes) {
    if (OP == Operand::int8) {
        uint32_t* at = block.tile(row / TALL * TALL) + row % TALL * 16;
        uint8_t* q = static_cast<uint8_t*>(bytes);
        quantise_row(x, n, q, block.scale + row, block.offset + row);
        memset(q + n, 0, block.words * 4 - n);
        for (int64_t step = 0; step < block.words / 16; ++step) store(at + step * TILE_WORDS, load<vu>(q + 64 * step));
        return;
    }
    int64_t k = 0;
    for (; k + 32 <= n; k += 32) store_step_of<OP>(block, row, k / 32, load<vf>(x + k), load<vf>(x + k + 16));
    if (k < n) {
        float rest[32] = {};
        memcpy(rest, x + k, (n - k) * sizeof(float));
        store_step_of<OP>(block, row, k / 32, load<vf>(rest), load<vf>(rest + 16));
    }
}

// Value k of output `lane` of a weight's panel; `of` is all of k.
template <Operand OP>
inline uint32_t* panel_word(uint32_t* panel, int64_t k, int64_t lane) {
    const int64_t word = k % PER_STEP<OP> * 16 / PER_STEP<OP>;
    return panel + (2 * PARTS<OP> * (k / PER_STEP<OP>) + lane / 16) * TILE_WORDS + word * 16 + lane % 16;
}
inline void put_float32(uint32_t* panel, int64_t k, int64_t of, int64_t lane, float x) {
    uint32_t parts[3];
    for (uint32_t& part : parts) {
        const uint16_t half = to_bfloat16(x);
        part = static_cast<uint32_t>(half) << (16 * (k % 2));
        x -= from_bfloat16(half);
    }
    uint32_t* at = panel_word<Operand::float32>(panel, k, lane);
    if (has_short_step<Operand::float32>(of) && k >= of / 32 * 32) {
        constexpr int64_t next = SHORT / 2 * 16, second = 2 * TILE_WORDS;
        for (int side = 0; side < 4; ++side) at[side * next] |= parts[1 - side % 2];
        at[second] |= parts[2], at[second + next] |= parts[0];
        return;
    }
    for (int part = 0; part < 3; ++part) at[part * 2 * TILE_WORDS] |= parts[part];
}
inline void put_bfloat16(uint32_t* panel, int64_t k, int64_t lane, float x) {
    *panel_word<Operand::bfloat16>(panel, k, lane) |= static_cast<uint32_t>(to_bfloat16(x)) << (16 * (k % 2));
}
inline void put_int8(uint32_t* panel, int64_t k, int64_t lane, int32_t q) {
    *panel_word<Operand::int8>(panel, k, lane) |= (static_cast<uint32_t>(q) & 255u) << (8 * (k % 4));
}

// Every how many lines the next panel is fetched into the second cache, whose own prefetching brings those between:
// asked for one by one they hold the buffers that loads need.
constexpr int64_t FETCH = 8;

template <Operand OP, int A, int B>
inline void add_tile() {  // A is 0 or 1, of the block's tiles; B of the panel's
    if constexpr (OP == Operand::int8) tile_int8<2 * A + B, 4 + A, 6 + B>();
    else tile_bfloat16<2 * A + B, 4 + A, 6 + B>();
}

// Products of two by two tiles a step; a short step has two.
template <Operand OP>
constexpr int64_t PRODUCTS = OP == Operand::float32 ? 6 : 1;

// `count` pieces of work spread evenly over `turns` calls.
struct Pace {
    int64_t count, turns, owed = 0;

    int64_t due() {
        int64_t pieces = 0;
        for (owed += count; owed >= turns; owed -= turns) ++pieces;
        return pieces;
    }
};

// Where the four tiles of sums of a pair of row tiles go, 16 x 16 each: [row tile][half of the panel].
constexpr int64_t PAIR_SUMS = 4 * TILE_WORDS;

// sums (+)= one or two row tiles (RT, `next` words apart) times a panel, over `steps` steps and, with `rest`, a short
// one. `between` is called after every product of two by two tiles, 64 cycles: work for the vector units meanwhile. In
// small pieces, for the processor looks 512 instructions ahead: a step's worth at once costs float32's MLP 5 to 9 %.
template <Operand OP, int RT, typename Between>
inline void multiply(const uint32_t* a, int64_t next, const uint32_t* b, int64_t steps, float* sums, bool fresh,
                     bool rest, Between& between) {
    if (fresh) {
        tile_zero<0>(), tile_zero<1>();
        if (RT == 2) tile_zero<2>(), tile_zero<3>();
    } else {
        tile_load<0>(sums, 64), tile_load<1>(sums + TILE_WORDS, 64);
        if (RT == 2) tile_load<2>(sums + 2 * TILE_WORDS, 64), tile_load<3>(sums + 3 * TILE_WORDS, 64);
    }
    constexpr int64_t of_a = PARTS<OP> * TILE_WORDS, of_b = 2 * of_a;
    const auto rows = [&](int part) {
        tile_stream<4>(a + part * TILE_WORDS, 64);
        if (RT == 2) tile_stream<5>(a + next + part * TILE_WORDS, 64);
    };
    const auto outputs = [&](int part) {
        tile_load<6>(b + 2 * part * TILE_WORDS, 64);
        tile_load<7>(b + (2 * part + 1) * TILE_WORDS, 64);
    };
    const auto add = [&] {
        add_tile<OP, 0, 0>(), add_tile<OP, 0, 1>();
        if (RT == 2) add_tile<OP, 1, 0>(), add_tile<OP, 1, 1>();
        between();
    };
    for (int64_t step = 0; step < steps; ++step, a += of_a, b += of_b) {
        if constexpr (OP == Operand::float32) {
            rows(2), outputs(0), add();
            rows(1), add();
            outputs(1), add();
            rows(0), add();
            outputs(2), add();
            outputs(0), add();
        } else {
            tile_load<6>(b, 64), tile_stream<4>(a, 64), add_tile<OP, 0, 0>();
            tile_load<7>(b + TILE_WORDS, 64), add_tile<OP, 0, 1>();
            if (RT == 2) tile_stream<5>(a + next, 64), add_tile<OP, 1, 0>(), add_tile<OP, 1, 1>();
            between();
        }
    }
    if (OP == Operand::float32 && rest) {
        rows(1), outputs(1), add();
        rows(0), outputs(0), add();
    }
    tile_store<0>(sums, 64), tile_store<1>(sums + TILE_WORDS, 64);
    if (RT == 2) tile_store<2>(sums + 2 * TILE_WORDS, 64), tile_store<3>(sums + 3 * TILE_WORDS, 64);
}

// Both row tiles of a pair, or the one there is.
template <Operand OP, typename Between>
inline void multiply_pair(int64_t tiles, const uint32_t* a, int64_t next, const uint32_t* b, int64_t steps, float* sums,
                          bool fresh, bool rest, Between& between) {
    if (tiles > 1) multiply<OP, 2>(a, next, b, steps, sums, fresh, rest, between);
    else multiply<OP, 1>(a, next, b, steps, sums, fresh, rest, between);
}

template <typename T>
inline T* sums_of(T* sums, int64_t row) {
    return sums + row / TALL * 2 * TILE_WORDS + row % TALL * 16;
}

template <Operand OP>
struct Sum {
    typedef vf type;
};
template <>
struct Sum<Operand::int8> {
    typedef vi type;
};

// The sums of one panel on their way to c, or into the packed rows of the next product, some rows at a time.
template <Operand OP>
class Finish {
public:
    Finish(const Block& block, const Packed& w, int64_t chunk, const Output& o, const Block* packed)
        : block_(block), w_(w), chunk_(chunk), o_(o), packed_(packed) {}

    void start(float* sums, int64_t column) {
        sums_ = sums, column_ = column, row_ = 0;
        const int64_t count = w_.n - column;
        for (int v = 0; v < 2; ++v) {
            mask_[v] = first_lanes(count - 16 * v);
            bias_[v] = o_.bias ? (vf)_mm512_maskz_loadu_ps(mask_[v], o_.bias + column + 16 * v) : vf{};
        }
    }
    void some(int64_t rows) {
        for (const int64_t stop = least(row_ + rows, block_.rows); row_ < stop; ++row_) row();
    }
    void all() { some(block_.rows); }

private:
    void row() {
        typedef typename Sum<OP>::type sum;
        const float* at = sums_of(sums_, row_);
        vf x[2] = {finished(load<sum>(at), block_, w_, chunk_, row_, column_),
                   finished(load<sum>(at + TILE_WORDS), block_, w_, chunk_, row_, column_ + 16)};
        for (int v = 0; v < 2; ++v) {
            x[v] += bias_[v];
            if (o_.gelu) x[v] = gelu_vector<OP == Operand::float32>(x[v]);
        }
        if (packed_) {
            return store_step_of<OP>(*packed_, row_, (o_.column + column_) / 32, x[0], x[1]);
        }
        const int64_t to = (o_.row + row_) * o_.c.stride + o_.column + column_;
        if (o_.c.type == Type::bfloat16 && !o_.accumulate && mask_[1] == 0xffff) {
            // A whole line, past the caches: bfloat16's qkv of 1,680 rows took 8 to 9 ms waiting for lines only to
            // overwrite them, now 5. float32's two lines a row, fetched ahead below, gain nothing.
            uint16_t* c = static_cast<uint16_t*>(o_.c.data) + to;
            const __m512i line = (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
            if (reinterpret_cast<uintptr_t>(c) % 64 == 0) _mm512_stream_si512(reinterpret_cast<__m512i*>(c), line);
            else store(c, line);
            return;
        }
        for (int v = 0; v < 2; ++v) {
            if (o_.c.type == Type::float32) {
                float* c = static_cast<float*>(o_.c.data) + to + 16 * v;
                __builtin_prefetch(c + 4 * o_.c.stride, 1);
                if (o_.accumulate) x[v] += (vf)_mm512_maskz_loadu_ps(mask_[v], c);
                _mm512_mask_storeu_ps(c, mask_[v], (__m512)x[v]);
            } else {
                uint16_t* c = static_cast<uint16_t*>(o_.c.data) + to + 16 * v;
                if (o_.accumulate) x[v] += widened(_mm256_maskz_loadu_epi16(mask_[v], c));
                _mm256_mask_storeu_epi16(c, mask_[v], (__m256i)_mm512_cvtneps_pbh((__m512)x[v]));
            }
        }
    }

    const Block& block_;
    const Packed& w_;
    const int64_t chunk_;
    const Output& o_;
    const Block* packed_;
    float* sums_ = nullptr;
    int64_t column_ = 0, row_ = 1 << 30;  // nothing to finish yet
    __mmask16 mask_[2] = {};
    vf bias_[2] = {};
};

// c (rows, n) (+)= block x weight^T, the block holding the weight's columns from k on; or into `packed`, which
// takes 32 outputs for a step. A panel's sums are finished while the next panel is multiplied.
template <Operand OP>
void product(const Block& block, const Packed& w, int64_t k, int64_t chunk, int64_t panel_first, int64_t panel_stop,
             const Output& o, const Block* packed = nullptr) {
    constexpr int64_t of_step = PARTS<OP> * TILE_WORDS;
    const int64_t steps = block.words / (16 * PARTS<OP>), tiles = ceil_div(block.rows, TALL), pairs = ceil_div(tiles, 2);
    const bool rest = block.words % (16 * PARTS<OP>) > 0;
    float* sums = static_cast<float*>(scratch(SUMS, 2 * pairs * PAIR_SUMS * sizeof(float)));
    Finish<OP> finish(block, w, chunk, o, packed);
    const int64_t fetches_all = block.words * LANES / 16 / FETCH;
    const int64_t turns = pairs * (PRODUCTS<OP> * steps + 2 * rest);
    Pace lines = {fetches_all, turns}, rows = {block.rows, turns};
    for (int64_t panel = panel_first; panel < panel_stop; ++panel) {
        float* own = sums + panel % 2 * pairs * PAIR_SUMS;
        const uint32_t* b = w.data + panel * w.words * LANES + k / PER_STEP<OP> * 2 * of_step;
        const char* ahead = reinterpret_cast<const char*>(b + w.words * LANES);
        int64_t fetches = panel + 1 < panel_stop ? fetches_all : 0;
        const auto between = [&] {
            for (int64_t i = least(lines.due(), fetches); i > 0; --i, --fetches, ahead += 64 * FETCH) {
                __builtin_prefetch(ahead, 0, 2);
            }
            finish.some(rows.due());
        };
        for (int64_t step = 0; step < steps + rest; step += STEPS_AT_ONCE<OP>) {
            for (int64_t pair = 0; pair < pairs; ++pair) {
                multiply_pair<OP>(tiles - 2 * pair, block.tile(2 * TALL * pair) + step * of_step, TALL * block.words,
                                  b + step * 2 * of_step, least(STEPS_AT_ONCE<OP>, steps - step),
                                  own + pair * PAIR_SUMS, step == 0, rest, between);
            }
        }
        finish.all();
        finish.start(own, panel * LANES);
    }
    finish.all();
    _mm_sfence();  // streamed lines are there before another thread is told so
}

// fc1 and its gelu for the hidden units first .. first + count of a block, packed for fc2. int8 needs a row
// whole for its scale.
template <Operand OP>
Block hidden_block(const Block& normed, const Packed& fc1, const float* bias, int64_t first, int64_t count) {
    const int64_t panel_first = first / LANES, panel_stop = ceil_div(first + count, LANES);
    const Block activation = new_block(PACKED_HIDDEN, normed.rows, packed_words<OP>(count));
    if (OP != Operand::int8) {
        product<OP>(normed, fc1, 0, 0, panel_first, panel_stop, {{}, 0, -first, bias, false, true}, &activation);
        return activation;
    }
    float* tile = static_cast<float*>(scratch(HIDDEN_ROWS, BLOCK * count * sizeof(float)));
    void* bytes = scratch(BYTES, activation.words * 4);
    const Output o = {{tile, count, Type::float32}, 0, -first, bias, false, true};
    product<OP>(normed, fc1, 0, 0, panel_first, panel_stop, o);
    for (int64_t i = 0; i < normed.rows; ++i) pack_row<OP>(activation, i, tile + i * count, count, bytes);
    return activation;
}

}  // namespace
}  // namespace NORMWEAR_ISA
}  // namespace normwear
