// linear: x weight^T + bias of bfloat16 or float8 operands, or GELU of it, as bfloat16. sm_90a.
//
// Two thread blocks of a cluster work on 256 rows by 192 columns: each on 128 rows, fetching half of the
// weights for both (TMA multicast). One warp has the copy engine (TMA) fetch, a stage of 128 bytes of K at a
// time. Two warpgroups have a tile of 128 by 192 each and take turns ("ping-pong"): while the tensor cores
// work for one, the other rounds and stores what it has, its epilogue.
//
// The numbers of fc1, 131,072 rows, 768 to 3,072, in bfloat16: 618 GFLOP, 0.63 ms at a nominal 989 TFLOP/s.
// A step of 64 values is 768 clocks of products; meanwhile shared memory serves 64 KB to them and takes 40
// from the copy engine, 139 bytes a clock where it has 128: 0.92 of the nominal rate at best. The L2 cache
// sends 28 KB for those 40, which without a cluster would be all of them and cost power. Bias, GELU and rounding
// are some 2,700 issue slots a warp, beside 9,216 clocks of products. It takes 0.86 ms after a pause, as the
// vendor's product alone, and 0.99 and 1.01 where an H100 and an H200 have to keep it up (2026-11-26): the
// sums with a bias alone 0.91, so that GELU is 0.1 ms of power.
#include <cuda_bf16.h>

#include "hopper.cuh"
#include "launch.h"
#include "linear.cuh"

namespace normwear::cuda {

namespace {

constexpr int tile_rows = 128;
constexpr int tile_columns = Accumulator::columns;
constexpr int strips = tile_columns / 32;  // of 32 columns: a lane has 8 side by side
constexpr int stages = 5;
constexpr int threads = 384;  // a producer's warpgroup and two that multiply
constexpr int rows_bytes = tile_rows * step_bytes;
constexpr int weights_bytes = tile_columns * step_bytes;
constexpr int stage_bytes = rows_bytes + weights_bytes;

struct Barriers {
    std::uint64_t full[stages], empty[stages];
    std::uint64_t turn[2];  // of the two warpgroups
};

// Bytes of dynamic shared memory: the stages, what the epilogue needs of every column, the barriers.
constexpr int shared_bytes(int columns) {
    return stages * stage_bytes + columns * 8 + static_cast<int>(sizeof(Barriers));
}
static_assert(shared_bytes(linear_columns) <= 227 * 1024);

struct Work {
    std::int64_t rows;
    int columns;
    int steps;  // of 128 bytes of K
    const float* bias;            // one of the two, or neither
    const __nv_bfloat16* bias16;
    const float *x_scale, *scale;
    __nv_bfloat16* out;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ std::uint32_t pack(float low, float high) {
    std::uint32_t two;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
    return two;
}

// Eight values of every lane's, side by side in shared memory.
__device__ __forceinline__ void eight(float (&to)[8], const float* from) {
    const float4 low = reinterpret_cast<const float4*>(from)[0];
    const float4 high = reinterpret_cast<const float4*>(from)[1];
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}

// Of this thread block's tile of a pair, where `across` tiles make the columns.
__device__ __forceinline__ std::int64_t first_row(int pair, int across) {
    return static_cast<std::int64_t>(pair / across * 2 + cluster_rank()) * tile_rows;
}

// What a lane has of a tile: 8 columns in 32, side by side, of rows 0, 8, 64 and 72 from `to` on.
struct Place8 {
    __nv_bfloat16* to;
    int stride;  // of the result's rows
    int rows;               // there are from `to` on
    const float* bias;  // in shared memory; `stride` further on is the columns' scale
    float x_scale[4];
};

__device__ __forceinline__ int row_of(int i) { return i / 2 * 64 + i % 2 * 8; }

// 32 columns of a tile that is done.
template <int Epilogue>
__device__ __forceinline__ void finish(const Accumulator& upper, const Accumulator& lower, int strip,
                                      const Place8& place) {
    __nv_bfloat16* to = place.to + 32 * strip;
    float bias[8];
    [[maybe_unused]] float scale[8];
    eight(bias, place.bias + 32 * strip);
    if constexpr (Epilogue == linear_scaled) eight(scale, place.bias + place.stride + 32 * strip);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const Accumulator& c = i < 2 ? upper : lower;
        float v[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = c.v[16 * strip + j / 2 * 4 + i % 2 * 2 + j % 2];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if constexpr (Epilogue == linear_scaled) {
                v[j] = scaled_sum(v[j], place.x_scale[i], scale[j], bias[j]);
            } else {
                v[j] += bias[j];
            }
        }
        if constexpr (Epilogue == linear_gelu) {
#pragma unroll
            for (int j = 0; j < 8; ++j) v[j] = gelu_bfloat16(v[j]);
        }
        if (row_of(i) < place.rows) {
            *reinterpret_cast<uint4*>(to + static_cast<std::ptrdiff_t>(row_of(i)) * place.stride) =
                make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
        }
    }
}

template <int Epilogue>
__device__ __forceinline__ void multiply(Accumulator& c, std::uint64_t a, std::uint64_t b, bool add) {
    if constexpr (Epilogue == linear_scaled) {
        multiply_float8(c, a, b, add);
    } else {
        multiply_bfloat16(c, a, b, add);
    }
}

#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define NORMWEAR_PAIRED  // an older architecture has no clusters, and no code here
#else
#define NORMWEAR_PAIRED __cluster_dims__(2)
#endif

template <int Epilogue>
__global__ void NORMWEAR_PAIRED __launch_bounds__(threads, 1)
    linear_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weight,
                  const Work work) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) std::uint8_t stages_at[];
    auto* bias_at = reinterpret_cast<float*>(stages_at + stages * stage_bytes);
    float* scale_at = bias_at + work.columns;
    auto& barriers = *reinterpret_cast<Barriers*>(scale_at + work.columns);
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == 0) {
        for (int i = 0; i < stages; ++i) {
            barrier_init(&barriers.full[i], 1);
            barrier_init(&barriers.empty[i], 8);  // four warps here and four of the other thread block
        }
        for (std::uint64_t& turn : barriers.turn) barrier_init(&turn, 4);
        barriers_ready();
    }
    for (int i = thread; i < work.columns; i += threads) {
        bias_at[i] = work.bias     ? work.bias[i]
                     : work.bias16 ? __bfloat162float(work.bias16[i])
                                   : 0.0f;
        if constexpr (Epilogue == linear_scaled) scale_at[i] = work.scale[i];
    }
    cluster_sync();

    const int across = work.columns / tile_columns;
    const int pairs = static_cast<int>((work.rows + 2 * tile_rows - 1) / (2 * tile_rows)) * across;
    const int clusters = static_cast<int>(gridDim.x) / 2;
    const int first = static_cast<int>(blockIdx.x) / 2;
    // The same for all of a warp, which the compiler cannot know: what it addresses stays in the uniform
    // registers that the products take their operands from.
    const int group = __shfl_sync(~0u, thread / 128, 0);
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (thread == 0) {
            const int rank = cluster_rank();
            Place<stages> place;
            for (int pair = first; pair < pairs; pair += clusters) {
                const auto row = static_cast<int>(first_row(pair, across));
                const int half = pair % across * strips + rank * (strips / 2);
#pragma unroll 1
                for (int k = 0; k < work.steps; ++k) {
                    std::uint8_t* at = stages_at + place.stage * stage_bytes;
                    std::uint64_t* full = &barriers.full[place.stage];
                    barrier_wait(&barriers.empty[place.stage], place.round ^ 1);
                    expect_bytes(full, stage_bytes);
                    fetch(at, &x, k * step_bytes, row, full);
                    fetch_for_both(at + rows_bytes + rank * (weights_bytes / 2), &weight, k * step_bytes,
                                   half, full);
                    place.next();
                }
            }
        }
        // The one lane's work is over before the others, which would take turns with it, wait as well.
        __syncwarp();
        cluster_sync();  // the other thread block's copies and arrivals come here until it is done
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const std::uint64_t rows_first = descriptor(stages_at);
    const std::uint64_t weights_first = descriptor(stages_at + rows_bytes);
    Place<stages> place;
    if (group == 2) place.skip(work.steps);
    // Begins as if the second warpgroup had just had its turn.
    std::uint32_t turns = group == 1 ? 1 : 0;
    const auto release = [&](int stage) {
        const int lane = again_thread() % 32;
        if (lane < 2) barrier_arrive(&barriers.empty[stage], lane);
    };
#pragma unroll 1
    for (int pair = first + (group - 1) * clusters; pair < pairs; pair += 2 * clusters) {
        Accumulator upper, lower;
        int held = 0;
        // A barrier's parity tells a stage's next contents from those before only if no one skips any: not
        // before the other warpgroup has seen the last of its stages.
        barrier_wait(&barriers.turn[group - 1], turns);
        turns ^= 1;
#pragma unroll 1
        for (int k = 0; k < work.steps; ++k) {
            barrier_wait(&barriers.full[place.stage], place.round);
            products_begin();
            const std::uint64_t a = rows_first + place.stage * (stage_bytes >> 4);
            const std::uint64_t b = weights_first + place.stage * (stage_bytes >> 4);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                multiply<Epilogue>(upper, a + 2 * i, b + 2 * i, k + i > 0);
                multiply<Epilogue>(lower, a + (64 * step_bytes >> 4) + 2 * i, b + 2 * i, k + i > 0);
            }
            products_end();
            if (k > 0) {
                products_wait<1>();
                release(held);
            }
            held = place.stage;
            place.next();
        }
        if (again_thread() % 32 == 0) barrier_arrive(&barriers.turn[2 - group]);
        products_wait<0>();
        arrived(upper);
        arrived(lower);
        release(held);
        place.skip(work.steps);

        const int own_thread = again_thread();
        const std::int64_t row =
            first_row(pair, across) + own_thread % 128 / 32 * 16 + own_thread % 32 / 4;
        const int own = pair % across * tile_columns + own_thread % 4 * 8;
        Place8 at{work.out + row * work.columns + own,
                  work.columns,
                  static_cast<int>(work.rows - row > tile_rows ? tile_rows : work.rows - row),
                  bias_at + own,
                  {}};
        if constexpr (Epilogue == linear_scaled) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (row_of(i) < at.rows) at.x_scale[i] = work.x_scale[row + row_of(i)];
            }
        }
#pragma unroll
        for (int strip = 0; strip < strips; ++strip) finish<Epilogue>(upper, lower, strip, at);
    }
    cluster_sync();
#endif
}

template <int Epilogue>
void run(const Linear& call, cudaStream_t stream) {
    // The most for all: another thread's launch may come between this and the next line.
    check(cudaFuncSetAttribute(linear_kernel<Epilogue>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shared_bytes(linear_columns)),
          "linear");
    const std::int64_t bytes = Epilogue == linear_scaled ? call.inner : 2 * call.inner;
    const bool half = call.bias_type == type_bfloat16;
    const Work work{call.rows,
                    call.columns,
                    static_cast<int>(bytes / step_bytes),
                    half ? nullptr : static_cast<const float*>(call.bias),
                    half ? static_cast<const __nv_bfloat16*>(call.bias) : nullptr,
                    call.x_scale,
                    call.scale,
                    static_cast<__nv_bfloat16*>(call.out)};
    const auto pairs = (call.rows + 2 * tile_rows - 1) / (2 * tile_rows) * (call.columns / tile_columns);
    const auto clusters = pairs < call.blocks / 2 ? pairs : call.blocks / 2;
    linear_kernel<Epilogue>
        <<<static_cast<unsigned>(2 * clusters), threads, shared_bytes(call.columns), stream>>>(
            tensor_map(call.x, bytes, call.rows, tile_rows),
            line_map(call.weight, bytes, call.columns, strips / 2), work);
    check_launch("linear");
}

}  // namespace

void linear(const Linear& call, std::uintptr_t stream) {
    if (call.rows == 0) return;
    const auto on = reinterpret_cast<cudaStream_t>(stream);
    switch (call.epilogue) {
        case linear_bias: return run<linear_bias>(call, on);
        case linear_gelu: return run<linear_gelu>(call, on);
        case linear_scaled: return run<linear_scaled>(call, on);
        default: throw std::runtime_error("CUDA linear: no such epilogue");
    }
}

}  // namespace normwear::cuda
