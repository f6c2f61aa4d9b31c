// Hopper's own instructions, as functions: barriers in shared memory that count arriving bytes, tiles by
// the copy engine, products of a warpgroup. PTX ISA, "mbarrier", "cp.async.bulk.tensor", "wgmma".
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>

#include <cstdint>
#include <string>

#include "check.cuh"

namespace normwear::cuda {

constexpr int step_bytes = 128;  // of a row that a stage holds: one swizzled line

// A warpgroup's sums of 64 rows and 192 columns. Those of lane l: rows l / 4 and + 8 of its warp's 16,
// columns 8 j + 2 (l % 4) and + 1.
struct Accumulator {
    static constexpr int columns = 192, values = columns / 2;
    float v[values];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// threadIdx.x, read anew: what is computed from it seldom must not hold a register all the time.
__device__ __forceinline__ int again_thread() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

__device__ __forceinline__ std::uint32_t address(const void* p) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void barrier_init(std::uint64_t* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(count));
}

// Barriers just initialised can be seen by the copy engine.
__device__ __forceinline__ void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(address(barrier)),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void barrier_arrive(std::uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

__device__ __forceinline__ void expect_bytes(std::uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)),
                 "r"(bytes)
                 : "memory");
}

// At the same barrier of a thread block of the cluster. Not release.cluster, which waits for all that the
// thread has stored (linear's fc1 took 1,507 us for 990): for those who only read what the barrier guards.
__device__ __forceinline__ void barrier_arrive(std::uint64_t* barrier, int block) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}\n" ::"r"(address(barrier)),
        "r"(block)
        : "memory");
}

// All threads of the cluster have come this far, and what they wrote can be seen.
__device__ __forceinline__ void cluster_sync() {
    asm volatile(
        "barrier.cluster.arrive.release;\n"
        "barrier.cluster.wait.acquire;\n" ::
            : "memory");
}

__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// The map's tile at a byte of its lines and at a line on its way; the barrier counts its bytes.
__device__ __forceinline__ void fetch(void* to, const CUtensorMap* map, int byte, int line,
                                      std::uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3}], [%4];" ::"r"(address(to)),
        "l"(reinterpret_cast<std::uint64_t>(map)), "r"(byte), "r"(line), "r"(address(barrier))
        : "memory");
}

// A tile of `line_map`'s on its way to the same place of both thread blocks of a pair, each of whose same
// barrier counts its bytes.
__device__ __forceinline__ void fetch_for_both(void* to, const CUtensorMap* map, int byte, int group,
                                               std::uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3, %3, %3, %4}], [%5], %6;" ::"r"(address(to)),
        "l"(reinterpret_cast<std::uint64_t>(map)), "r"(byte), "r"(0), "r"(group), "r"(address(barrier)),
        "h"(static_cast<std::uint16_t>(3))
        : "memory");
}

// What wgmma needs to know of a tile: where, 1,024 bytes from eight lines to the next, 128-byte swizzle.
__device__ __forceinline__ std::uint64_t descriptor(const void* tile) {
    return ((address(tile) & 0x3FFFF) >> 4) | (std::uint64_t{1} << 16) | (std::uint64_t{64} << 32) |
           (std::uint64_t{1} << 62);
}

#define NORMWEAR_4(a, i) "+f"(a[i]), "+f"(a[i + 1]), "+f"(a[i + 2]), "+f"(a[i + 3])
#define NORMWEAR_16(a, i) \
    NORMWEAR_4(a, i), NORMWEAR_4(a, i + 4), NORMWEAR_4(a, i + 8), NORMWEAR_4(a, i + 12)
#define NORMWEAR_96(a)                                                          \
    NORMWEAR_16(a, 0), NORMWEAR_16(a, 16), NORMWEAR_16(a, 32), NORMWEAR_16(a, 48), \
        NORMWEAR_16(a, 64), NORMWEAR_16(a, 80)

// 64 rows by 192 columns by 32 bytes of K; `add` false starts from zero.
#define NORMWEAR_MULTIPLY(name, kind, options)                                              \
    __device__ __forceinline__ void name(Accumulator& c, std::uint64_t a, std::uint64_t b,  \
                                         bool add) {                                        \
        asm volatile(                                                                       \
            "{\n"                                                                           \
            ".reg .pred p;\n"                                                               \
            "setp.ne.b32 p, %98, 0;\n"                                                      \
            "wgmma.mma_async.sync.aligned." kind " {"                                       \
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "        \
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, "   \
            "%31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "   \
            "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, "   \
            "%61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, "   \
            "%76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, "   \
            "%91, %92, %93, %94, %95}, %96, %97, p, " options ";\n"                         \
            "}\n"                                                                           \
            : NORMWEAR_96(c.v)                                                              \
            : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                  \
    }

NORMWEAR_MULTIPLY(multiply_float8, "m64n192k32.f32.e4m3.e4m3", "1, 1")
NORMWEAR_MULTIPLY(multiply_bfloat16, "m64n192k16.f32.bf16.bf16", "1, 1, 0, 0")

__device__ __forceinline__ void products_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_end() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// All groups of products are done, but the last `Left`.
template <int Left>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
}

// Nothing reads the accumulator before this point.
__device__ __forceinline__ void arrived(Accumulator& c) {
#pragma unroll
    for (int i = 0; i < Accumulator::values; ++i) asm volatile("" : "+f"(c.v[i])::"memory");
}

// A place in a ring of stages, and whether the ring has been around an odd number of times: the parity
// that its barriers are waited for with.
template <int Stages>
struct Place {
    int stage = 0;
    std::uint32_t round = 0;

    __device__ __forceinline__ void next() {
        if (++stage == Stages) {
            stage = 0;
            round ^= 1;
        }
    }

    __device__ __forceinline__ void skip(int steps) {
        stage += steps;
        round = (round + stage / Stages) & 1;
        stage %= Stages;
    }
};

#endif

// cuTensorMapEncodeTiled, of the driver that is loaded: nothing here links to it.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
    static PFN_cuTensorMapEncodeTiled_v12000 found = [] {
        void* address = nullptr;
        cudaDriverEntryPointQueryResult state;
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000,
                                               cudaEnableDefault, &state),
              "tensor map");
        if (state != cudaDriverEntryPointSuccess) {
            throw std::runtime_error("CUDA tensor map: the driver has none");
        }
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(address);
    }();
    return found;
}

// A matrix of lines of so many bytes, end to end, in tiles of so many lines of 128 bytes; past the end are
// zeros.
inline CUtensorMap tensor_map(const void* matrix, std::int64_t line_bytes, std::int64_t lines,
                              unsigned tile_lines) {
    CUtensorMap map;
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(line_bytes), static_cast<cuuint64_t>(lines)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(line_bytes)};
    const cuuint32_t box[] = {step_bytes, tile_lines};
    const cuuint32_t each[] = {1, 1};
    const CUresult result = tensor_map_encoder()(
        &map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(matrix), sizes, strides, box, each,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        throw std::runtime_error("CUDA tensor map: error " + std::to_string(result));
    }
    return map;
}

// The same of a weight's lines, in groups of 32: tiles of so many groups, in which a line stands where a
// lane of the tensor cores will hold what comes of it. Of a group, line 8 q + 2 j + e comes to 8 j + 2 q + e,
// so that the 8 columns of lane q are neighbours.
inline CUtensorMap line_map(const void* matrix, std::int64_t line_bytes, std::int64_t lines,
                            unsigned tile_groups) {
    CUtensorMap map;
    const auto line = static_cast<cuuint64_t>(line_bytes);
    const cuuint64_t sizes[] = {line, 2, 4, 4, static_cast<cuuint64_t>(lines / 32)};
    const cuuint64_t strides[] = {line, 8 * line, 2 * line, 32 * line};
    const cuuint32_t box[] = {step_bytes, 2, 4, 4, tile_groups};
    const cuuint32_t each[] = {1, 1, 1, 1, 1};
    const CUresult result = tensor_map_encoder()(
        &map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 5, const_cast<void*>(matrix), sizes, strides, box, each,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        throw std::runtime_error("CUDA tensor map: error " + std::to_string(result));
    }
    return map;
}

}  // namespace normwear::cuda
