// The CPU operators: one table of functions for every instruction set they were compiled for.
#pragma once

#include <cstdint>

#if !defined(__SSE__)
#include <fenv.h>
#endif

namespace normwear {

// Values of an activation in memory.
enum class Type : int { float32 = 0, bfloat16 = 1 };

// What a matrix product multiplies; sums are float32, or exact int32 for int8.
enum class Operand : int { float32 = 0, bfloat16 = 1, int8 = 2 };

// A weight matrix (n, k) as its instruction set wants it: panels of `lanes` outputs, in them 32-bit words of
// every output (1 float32, 2 bfloat16 or 4 int8; on the tile unit a float32 is three bfloat16).
struct Packed {
    Operand operand;
    std::int64_t n, k;
    std::int64_t words;    // of an output: what packed_words says of k
    std::int64_t panels;   // of outputs
    std::int64_t chunk;    // int8: columns that share one activation scale a row, a multiple of 64; or k
    const std::uint32_t* data;
    const float* scale;    // int8: (panels * lanes) of each output
    const float* sums;     // int8: (chunks, panels * lanes), scale times the sum of each chunk's weights
};

struct View {  // of activations: rows at a stride counted in elements
    void* data;
    std::int64_t stride;
    Type type;
};

struct LinearArguments {
    View a;                  // (rows, k)
    bool standardise;        // each row of a + carried first
    const float* carried;    // (k,) or null
    float eps;
    Packed weight;
    const float* bias;       // (n,) or null
    bool gelu;
    bool accumulate;         // c += instead of c =
    View c;                  // (rows, n)
    std::int64_t rows;
};

struct FeedArguments {  // residual += proj(attended); residual += fc2(gelu(fc1(norm(residual))))
    float* residual;         // (rows, E) contiguous
    View attended;           // (rows, E)
    std::int64_t rows;
    Packed proj, fc1, fc2;
    const float* carried;    // (E,)
    const float* fc1_bias;   // (hidden,)
    float eps;
};

struct AttentionArguments {
    View query, key_value, out;  // (query rows, E), (key rows, 2 E), (query rows, E), one type
    const std::int64_t *queries, *keys;  // (segments + 1,) bounds
    std::int64_t segments, heads, head_size;
};

struct TokenizeArguments {
    const float* series;
    const std::int64_t *samples, *tokens;  // (sequences + 1,) bounds
    std::int64_t sequences;
    const std::int64_t* table;             // (sequences,) row of the arrays below for each
    const float* const* taps;              // filters, one patch column after another, (taps, scales)
    const std::int64_t* const* spans;      // (columns, 4): first tap, last + 1, offset into taps, 1 if even
    const std::int64_t* padding;           // zeros before the series
    const float* const* templates;         // (tokens, E)
    std::int64_t columns, patch_rows, patch_scales;
    Packed weight;                         // (E, patch_rows * word-padded 3 patch_scales)
    float* residual;
    std::int64_t width;
};

struct NormArguments {
    float* residual;         // (rows, width) contiguous
    View update;             // (rows, width) or null, added to the residual
    const float* carried;    // (width,) or null
    float eps;
    std::int64_t rows, width;
    View out;
};

struct PoolArguments {
    const float* residual;   // (tokens, width) contiguous
    View update;             // (tokens, width) or null
    const float *carried, *weight, *bias;
    float eps;
    const std::int64_t* bounds;  // (sequences + 1,)
    std::int64_t sequences, width;
    int pool;                // 0 mean, 1 cls, 2 patch
    float* out;
};

struct QuantiseArguments {
    View x;                  // (rows, width)
    const float* bias;       // (width,): x becomes gelu(x + bias) first; or null
    std::int64_t rows, width;
    std::uint8_t* out;       // (rows, width): x ~ scale * out + offset
    float *scale, *offset;   // (rows,)
};

struct Kernels {
    const char* name;
    std::int64_t lanes;      // outputs of a panel
    int largest_weight;      // of int8: what no product of the set's instructions saturates at
    bool native_bfloat16;    // the instruction set multiplies bfloat16 by itself
    std::int64_t (*packed_words)(Operand, std::int64_t k);
    void (*pack)(const float* weight, std::int64_t stride, std::uint32_t* data, float* scale,
                 float* sums, const Packed& shape, int threads);
    void (*linear)(const LinearArguments&, int threads);
    void (*feed)(const FeedArguments&, int threads);
    void (*attention)(const AttentionArguments&, int threads);
    void (*tokenize)(const TokenizeArguments&, int threads);
    void (*residual_norm)(const NormArguments&, int threads);
    void (*bias_gelu)(View x, const float* bias, std::int64_t rows, std::int64_t width, int threads);
    void (*pool_norm)(const PoolArguments&, int threads);
    void (*quantise)(const QuantiseArguments&, int threads);
};

// By name, or null where this build or this processor does not have it: portable, avx2, avx512 (with
// VNNI), avx512bf16, amx (with all of that).
const Kernels* kernels(const char* name);

// Scratch memory of the calling thread, 64-byte aligned, kept for its next use; slots do not overlap.
void* scratch(int slot, std::int64_t bytes);

// Gives back what of it one huge window needed: slots of more than 64 MB.
void trim_scratch() noexcept;

// While it lives its thread computes as a fresh process does: rounding to nearest, subnormal values kept, no traps.
// Another library may have changed that in the caller's thread (torch.set_flush_denormal, one linked with
// -ffast-math), and a worker has what its creator had when it started: a row's bits would depend on who computes it.
class Arithmetic {
public:
    Arithmetic();
    ~Arithmetic();
    Arithmetic(const Arithmetic&) = delete;

private:
#if defined(__SSE__)
    unsigned before_;
#else
    fenv_t before_;
#endif
};

// An exception that leaves a parallel region ends the process. So each job catches what `scratch` throws, the only
// one there is, and it is thrown again behind the region; what the operator was writing is then incomplete.
class Failure {
public:
    void note() noexcept { __atomic_store_n(&happened_, true, __ATOMIC_RELAXED); }
    void raise() const;  // std::bad_alloc

private:
    bool happened_ = false;
};

// How many of `threads` are worth waking for `work` steps: parallel.h's team_size.
int cpu_team(int threads, std::int64_t work, std::int64_t grain);

}  // namespace normwear
