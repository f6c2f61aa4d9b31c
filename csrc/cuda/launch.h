// The CUDA operators as plain C++: what a launch needs, and the launches. No CUDA header is needed to
// call them. Pointers are the device's; a stream is a cudaStream_t as an integer. Not one of them
// waits for the device. They throw std::runtime_error with one line where a launch is refused.
#pragma once

#include <cstdint>

namespace normwear::cuda {

enum Type : int { type_float32 = 0, type_bfloat16 = 1, type_float8 = 2, type_int16 = 3, type_int32 = 4 };

// Adds `update` to the residual in place, then standardises residual + carried.
struct ResidualNorm {
    void* residual;        // (rows, width), residual_type: float32 or bfloat16
    const void* update;    // (rows, width), update_type: float32 or bfloat16; or null
    const float* carried;  // (width) or null
    void* out;             // (rows, width), out_type: float32, bfloat16 or float8
    float* scale;          // (rows) for float8: what a row was divided by; else null
    std::int64_t rows;
    int width;             // a multiple of 4, at most 4096
    int residual_type, update_type, out_type;
    float eps;
};

// Series to tokens: differences, wavelets, patches of 9 rows by 5 scales, template.
struct Tokenize {
    const float* series;               // (samples of all sequences)
    const std::int32_t* cu_samples;    // (sequences + 1)
    const std::int32_t* cu_tokens;     // (sequences + 1)
    const std::int32_t* sequences_at;  // (sequences, 2): first template row, bank
    const std::int32_t* bank_columns;  // (banks, columns, 4): first tap, its shift, taps, 0
    const float* bank_taps;            // (taps of all banks, 8): a tap of 5 scales, 3 zeros
    const float* weights;              // packed: see tokenize.cuh
    const float* templates;            // (T of all template, width)
    void* residual;                    // (tokens, width), residual_type
    int sequences;
    int tiles;    // thread blocks a sequence: of the longest one
    int columns;  // of patches: scales / 5
    int width;    // a multiple of 4; of 8 for tf32
    int lead;     // samples before a row that the banks reach
    int span;     // samples a thread block holds
    int residual_type;  // float32 or bfloat16
    bool tf32;          // TF32 products of patches and weights; else float32
};

// Raw samples to windows at the model's rate, in float64.
struct Ingest {
    const void* raw;  // (channels, samples), raw_type: int16, int32 or float32
    std::int64_t channel_stride, sample_stride, samples;  // strides in elements
    const std::int64_t* starts;   // (windows): sample a window starts with; may lie outside
    const std::int32_t* lengths;  // (windows): raw samples, 1 or more
    const double* offsets;        // (windows): of the first sample after the window's start, s
    const double* gain;           // (channels): physical = raw * gain + baseline
    const double* baseline;       // (channels)
    const std::int64_t* invalid;  // (channels): code of a missing sample; INT64_MIN for none
    const std::int32_t* filters;  // (windows): which filter resamples it
    const std::int32_t* first;    // (filters, outputs): first input of an output
    const std::int32_t* phase;    // (filters, outputs): column of `weights`
    const double* weights;        // (filters, taps, phases)
    const double* statistics;     // (channels, 2): mean and std, for normalize 2
    const double* smoothing;      // (11): Gaussian of the reference preprocessing
    float* out;                   // (windows, channels, outputs)
    std::int32_t* missing;        // (windows, channels): samples missing before filling
    std::int32_t* flags;          // (windows, channels): sum of flag_*
    double* scratch;              // (windows * channels, ingest_values()), or null: shared memory
    int windows, channels, outputs, taps, phases, longest;
    int raw_type;
    int hold;       // 1: ends held beyond the window; 0: continued along the line through them
    int reference;  // 1: the preprocessing of NormWear's pretraining in place of the filter
    int normalize;  // 0 none, 1 the window's own mean and std, 2 `statistics`
    double rate, target_rate;
};

// GELU(x weight^T + bias) of float8 operands as float8. sm_90a only; up to 2^35 results.
struct LinearFloat8 {
    const void* x;         // (rows, linear_float8_inner) e4m3
    const float* x_scale;  // (rows): x stands for x_scale x
    const void* weight;    // (columns, linear_float8_inner) e4m3
    const void* pairs;     // (columns / 2, 16 bytes), of two columns: their weights' scales in float32, their
                           // biases in bfloat16, what their results are multiplied by in bfloat16
    void* out;             // (rows, columns) e4m3, columns in the order of linear_float8_order
    std::int64_t rows;
    int columns;  // a multiple of 384 * parts, at most linear_float8_columns
    int parts;    // how many thread blocks share 128 rows
    int blocks;   // thread blocks at most: the device's multiprocessors
};

constexpr int linear_float8_inner = 768;
constexpr int linear_float8_columns = 3072;

// Of 32 columns of the result the i-th is this one of the product: a lane's 8 stand side by side.
constexpr int linear_float8_order(int i) { return i % 8 / 2 * 8 + i / 8 * 2 + i % 2; }

// x weight^T + bias as bfloat16, or GELU of it. sm_90a only.
struct Linear {
    const void* x;         // (rows, inner) bfloat16; e4m3 for linear_scaled
    const void* weight;    // (columns, inner) likewise
    const void* bias;      // (columns), bias_type: float32 or bfloat16; or null
    const float* x_scale;  // (rows), of linear_scaled: x stands for x_scale x
    const float* scale;    // (columns), of linear_scaled: a row of `weight` stands for scale times it
    void* out;             // (rows, columns) bfloat16
    std::int64_t rows;     // up to 2^30
    int columns;           // a multiple of 192, at most linear_columns
    int inner;             // a multiple of 64; of 128 for linear_scaled
    int epilogue;
    int bias_type;
    int blocks;            // thread blocks at most, 2 or more: the device's multiprocessors
};

constexpr int linear_columns = 3072;
constexpr int linear_bias = 0, linear_gelu = 1, linear_scaled = 2;  // scaled: of float8, with a bias

constexpr int flag_flat = 1;       // does not vary
constexpr int flag_empty = 2;      // no valid sample: NaN
constexpr int flag_too_large = 4;  // beyond float32

#ifdef __CUDACC__
#define NORMWEAR_BOTH __host__ __device__
#else
#define NORMWEAR_BOTH
#endif

// float64 values a thread block of `ingest` works on.
NORMWEAR_BOTH inline std::int64_t ingest_values(std::int64_t longest, std::int64_t outputs) {
    return longest + 2 * outputs;
}

// Above this many they do not fit in shared memory and `scratch` is needed: 96 KB, two thread blocks a
// multiprocessor from sm_80 up.
constexpr std::int64_t ingest_shared_values = 12288;

void residual_norm(const ResidualNorm& call, std::uintptr_t stream);
void tokenize(const Tokenize& call, std::uintptr_t stream);
void ingest(const Ingest& call, std::uintptr_t stream);
void linear_float8(const LinearFloat8& call, std::uintptr_t stream);
void linear(const Linear& call, std::uintptr_t stream);

// Whether the driver is new enough for the runtime this is linked to, and the current device has code.
bool ingest_runs();

// Whether the driver is new enough for the runtime this is linked to, and makes tensor maps.
bool hopper_runs();

}  // namespace normwear::cuda
