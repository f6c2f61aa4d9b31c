// linear_float8: GELU(x weight^T + bias) of float8 operands as float8. sm_90a.
//
// A thread block keeps its 128 rows (all of K: 96 KB) in shared memory and lets the weights stream past,
// 192 columns at a time. One warp has the copy engine fetch; each of two warpgroups owns 64 rows and two
// accumulators of 192 columns: while the tensor cores fill one, the warpgroup's own instructions empty the
// other, six strips of 32 columns in six steps of 128 values of K.
//
// Shared memory decides the shape: 128 bytes a clock serve the tensor cores' reads and the copy engine's
// writes. With the rows resident a step of 32 values reads 16 KB and writes 6, 176 clocks beside 192 of
// products; tiles of 128 columns would be at the limit, both operands streaming beyond it. A full
// micro-batch is 618 GFLOP, 0.31 ms at a nominal 1,979 TFLOP/s, 0.36 with the rows of 1,024 blocks on 132
// multiprocessors and what the clock is in fact (1.7 GHz); it takes 0.55 on an H100 and an H200, no longer
// than the vendor's product alone.
#include <type_traits>

#include "hopper.cuh"
#include "launch.h"
#include "linear.cuh"

namespace normwear::cuda {

namespace {

constexpr int tile_rows = 128;
constexpr int tile_columns = Accumulator::columns;
constexpr int steps = linear_float8_inner / step_bytes;  // 6
constexpr int stages = 4;
constexpr int threads = 384;  // a producer's warpgroup and two that multiply
constexpr int rows_bytes = tile_rows * step_bytes;
constexpr int weights_bytes = tile_columns * step_bytes;
constexpr int strips = tile_columns / 32;  // of a tile, emptied one at a step
static_assert(strips <= steps);

struct Barriers {
    std::uint64_t rows_full[steps], rows_empty[steps];
    std::uint64_t weights_full[stages], weights_empty[stages];
};

// Bytes of dynamic shared memory: both operands' tiles, what the epilogue needs of every column, the barriers.
constexpr int shared_bytes(int columns) {
    return steps * rows_bytes + stages * weights_bytes + columns * 8 + static_cast<int>(sizeof(Barriers));
}
static_assert(shared_bytes(linear_float8_columns) <= 227 * 1024);

struct Work {
    std::int64_t rows;
    int columns;
    int parts;  // thread blocks that share 128 rows, each with columns / parts of the columns
    const float* x_scale;
    const uint4* pairs;
    std::uint8_t* out;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Where an accumulator belongs: this lane's two rows.
struct Tile {
    float scale[2];
    std::uint32_t out;  // eighths of the place of this lane's share of the tile's first columns in the result
    int pair;           // of columns, this lane's first of the tile
    int rows;           // how many of the two there are
};

__device__ __forceinline__ float low_half(std::uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(std::uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

// 32 columns of a tile that is done. A lane's 8 values stand side by side, the columns in the order that
// linear_float8_order says. Each strip has its own store, or the compiler would put all
// of them in one place.
template <int Strip>
__device__ __forceinline__ void empty(const Accumulator& c, const Tile& tile, const Work& work,
                                      const uint4* pairs) {
    std::uint32_t packed[2][2];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const uint4 p = pairs[tile.pair + 16 * Strip + 4 * j];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int at = 16 * Strip + 4 * j + 2 * r;
            const float low = scaled_sum(c.v[at], tile.scale[r], __uint_as_float(p.x), low_half(p.z));
            const float high =
                scaled_sum(c.v[at + 1], tile.scale[r], __uint_as_float(p.y), high_half(p.z));
            const std::uint32_t two =
                float8_pair(gelu_float8(low) * low_half(p.w), gelu_float8(high) * high_half(p.w));
            packed[r][j / 2] = j % 2 ? packed[r][j / 2] | two << 16 : two;
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (r >= tile.rows) continue;
        reinterpret_cast<uint2*>(work.out)[tile.out + 4 * Strip + r * static_cast<unsigned>(work.columns)] =
            make_uint2(packed[r][0], packed[r][1]);
    }
}

#endif

__global__ void __launch_bounds__(threads, 1)
    linear_float8_kernel(const __grid_constant__ CUtensorMap x,
                         const __grid_constant__ CUtensorMap weight, const Work work) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) std::uint8_t rows_at[];
    std::uint8_t* weights_at = rows_at + steps * rows_bytes;
    auto* pairs = reinterpret_cast<uint4*>(weights_at + stages * weights_bytes);
    auto& barriers = *reinterpret_cast<Barriers*>(pairs + work.columns / 2);
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == 0) {
        for (int i = 0; i < steps; ++i) {
            barrier_init(&barriers.rows_full[i], 1);
            barrier_init(&barriers.rows_empty[i], 8);
        }
        for (int i = 0; i < stages; ++i) {
            barrier_init(&barriers.weights_full[i], 1);
            barrier_init(&barriers.weights_empty[i], 8);
        }
        barriers_ready();
    }
    for (int i = thread; i < work.columns / 2; i += threads) pairs[i] = work.pairs[i];
    __syncthreads();

    const int tiles = work.columns / tile_columns / work.parts;
    const auto blocks = static_cast<int>((work.rows + tile_rows - 1) / tile_rows) * work.parts;
    // The same for all of a warp, which the compiler cannot know: what it addresses stays in the uniform
    // registers that the products take their operands from.
    const int group = __shfl_sync(~0u, thread / 128, 0);
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (thread != 0) return;
        Place<stages> place;
        std::uint32_t round = 0;
        for (int block = static_cast<int>(blockIdx.x); block < blocks; block += gridDim.x) {
            const int row = block / work.parts * tile_rows;
            const int first = block % work.parts * tiles * tile_columns;
            for (int t = 0; t < tiles; ++t) {
                for (int k = 0; k < steps; ++k) {
                    if (t == 0) {
                        barrier_wait(&barriers.rows_empty[k], round ^ 1);
                        expect_bytes(&barriers.rows_full[k], rows_bytes);
                        fetch(rows_at + k * rows_bytes, &x, k * step_bytes, row,
                              &barriers.rows_full[k]);
                    }
                    barrier_wait(&barriers.weights_empty[place.stage], place.round ^ 1);
                    expect_bytes(&barriers.weights_full[place.stage], weights_bytes);
                    fetch(weights_at + place.stage * weights_bytes, &weight, k * step_bytes,
                          first + t * tile_columns, &barriers.weights_full[place.stage]);
                    place.next();
                }
            }
            round ^= 1;
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int lane = thread % 32;
    const std::uint64_t rows_first = descriptor(rows_at + (group - 1) * 64 * step_bytes);
    const std::uint64_t weights_first = descriptor(weights_at);

    Accumulator even, odd{};
    Tile done{};  // before the first tile: no rows, nothing is written
    Place<stages> place;
    std::uint32_t round = 0;
    int held = 0;        // stage whose products may still be running
    int held_rows = -1;  // and the rows' tile, where this was their last use

    const auto release = [&] {
        if (lane != 0) return;
        barrier_arrive(&barriers.weights_empty[held]);
        if (held_rows >= 0) barrier_arrive(&barriers.rows_empty[held_rows]);
    };
    // A tile's products into `into`, while the tile before, in `from`, is emptied.
    const auto run = [&](Accumulator& into, Accumulator& from, bool first_tile, bool last_tile) {
        const auto step = [&](auto number) {
            constexpr int k = decltype(number)::value;
            if (first_tile) barrier_wait(&barriers.rows_full[k], round);
            barrier_wait(&barriers.weights_full[place.stage], place.round);
            products_begin();
            const std::uint64_t a = rows_first + k * (rows_bytes >> 4);
            const std::uint64_t b = weights_first + place.stage * (weights_bytes >> 4);
#pragma unroll
            for (int i = 0; i < 4; ++i) multiply_float8(into, a + 2 * i, b + 2 * i, k + i > 0);
            products_end();
            if constexpr (k < strips) empty<k>(from, done, work, pairs);
            if constexpr (k > 0) {
                products_wait<1>();
                release();
            }
            held = place.stage;
            held_rows = last_tile ? k : -1;
            place.next();
        };
        step(std::integral_constant<int, 0>{});
        step(std::integral_constant<int, 1>{});
        step(std::integral_constant<int, 2>{});
        step(std::integral_constant<int, 3>{});
        step(std::integral_constant<int, 4>{});
        step(std::integral_constant<int, 5>{});
        products_wait<0>();
        arrived(into);
        release();
        done.pair += tile_columns / 2;
        done.out += tile_columns / 8;
    };
    const int mine = (blocks - 1 - static_cast<int>(blockIdx.x)) / static_cast<int>(gridDim.x) + 1;
    int block = static_cast<int>(blockIdx.x);
    int t = 0;
#pragma unroll 1
    for (int pair = mine * tiles / 2; pair > 0; --pair) {
        const bool last = t + 2 == tiles;
        products_wait<0>();  // there are none; without it ptxas waits for all of `even` first
        arrived(odd);
        run(even, odd, t == 0, false);
        if (t == 0) {
            const int own = again_thread();
            const int quarter = own % 4;
            const int column = block % work.parts * tiles * tile_columns;
            const std::int64_t row = static_cast<std::int64_t>(block / work.parts) * tile_rows +
                                     (own / 128 - 1) * 64 + own % 128 / 32 * 16 + own % 32 / 4;
            done.pair = column / 2 + quarter;
            done.out = static_cast<std::uint32_t>((row * work.columns + column) / 8 + quarter);
            done.rows = (row < work.rows) + (row + 8 < work.rows);
            done.scale[0] = row < work.rows ? work.x_scale[row] : 0.0f;
            done.scale[1] = row + 8 < work.rows ? work.x_scale[row + 8] : 0.0f;
        }
        run(odd, even, false, last);
        t = last ? 0 : t + 2;
        if (last) {
            block += gridDim.x;
            round ^= 1;
        }
    }
    empty<0>(odd, done, work, pairs);
    empty<1>(odd, done, work, pairs);
    empty<2>(odd, done, work, pairs);
    empty<3>(odd, done, work, pairs);
    empty<4>(odd, done, work, pairs);
    empty<5>(odd, done, work, pairs);
#endif
}

}  // namespace

bool hopper_runs() {
    int devices;
    if (cudaGetDeviceCount(&devices) != cudaSuccess) {
        cudaGetLastError();  // it is told, not kept for the next call
        return false;
    }
    try {
        tensor_map_encoder();
    } catch (const std::runtime_error&) {
        cudaGetLastError();
        return false;
    }
    return devices > 0;
}

void linear_float8(const LinearFloat8& call, std::uintptr_t stream) {
    if (call.rows == 0) return;
    const int bytes = shared_bytes(call.columns);
    // The largest for all: another thread's launch may come between this and the next line.
    check(cudaFuncSetAttribute(linear_float8_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shared_bytes(linear_float8_columns)),
          "linear_float8");
    const Work work{call.rows,    call.columns, call.parts, call.x_scale,
                    static_cast<const uint4*>(call.pairs), static_cast<std::uint8_t*>(call.out)};
    const auto blocks = (call.rows + tile_rows - 1) / tile_rows * call.parts;
    const auto grid = static_cast<unsigned>(blocks < call.blocks ? blocks : call.blocks);
    linear_float8_kernel<<<grid, threads, bytes, reinterpret_cast<cudaStream_t>(stream)>>>(
        tensor_map(call.x, linear_float8_inner, call.rows, tile_rows),
        tensor_map(call.weight, linear_float8_inner, call.columns,
                   tile_columns),
        work);
    check_launch("linear_float8");
}

}  // namespace normwear::cuda
