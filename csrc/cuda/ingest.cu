#include "check.cuh"
#include "ingest.cuh"

namespace normwear::cuda {

namespace {

// Two thread blocks a multiprocessor leave 128 registers: no more than a full shared memory allows.
__global__ void __launch_bounds__(ingest_threads, 2) ingest_kernel(const Ingest call) {
    __shared__ IngestShared shared;
    extern __shared__ __align__(16) double values[];
    DeviceBlock block;
    ingest_body(block, call, shared, values);
}

}  // namespace

bool ingest_runs() {
    cudaFuncAttributes attributes;
    const bool runs = cudaFuncGetAttributes(&attributes, ingest_kernel) == cudaSuccess;
    if (!runs) cudaGetLastError();  // it is told, not kept for the next call
    return runs;
}

void ingest(const Ingest& call, std::uintptr_t stream) {
    if (call.windows == 0 || call.channels == 0) return;
    const std::int64_t values =
        call.scratch == nullptr ? ingest_values(call.longest, call.outputs) : 0;
    const auto bytes = static_cast<int>(values * static_cast<std::int64_t>(sizeof(double)));
    check(cudaFuncSetAttribute(ingest_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "ingest");
    const auto blocks = static_cast<unsigned>(call.windows) * static_cast<unsigned>(call.channels);
    ingest_kernel<<<blocks, ingest_threads, bytes, reinterpret_cast<cudaStream_t>(stream)>>>(call);
    check_launch("ingest");
}

}  // namespace normwear::cuda
