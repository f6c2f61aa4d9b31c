#include "check.cuh"
#include "tokenize.cuh"

namespace normwear::cuda {

namespace {

// 3 thread blocks a multiprocessor: 112 registers, and 54 KB of shared memory each.
template <class Residual, bool Tf32>
__global__ void __launch_bounds__(tokenize_threads, 3) tokenize_kernel(const Tokenize call) {
    extern __shared__ __align__(16) float shared[];
    DeviceBlock block;
    tokenize_body<Residual, Tf32>(block, call, shared);
}

template <class Residual, bool Tf32>
void launch(const Tokenize& call, cudaStream_t stream) {
    const auto bytes = static_cast<int>(tokenize_shared_bytes(call.span));
    check(cudaFuncSetAttribute(tokenize_kernel<Residual, Tf32>,
                               cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "tokenize");
    const auto blocks = static_cast<unsigned>(call.sequences) * static_cast<unsigned>(call.tiles);
    tokenize_kernel<Residual, Tf32><<<blocks, tokenize_threads, bytes, stream>>>(call);
}

}  // namespace

void tokenize(const Tokenize& call, std::uintptr_t stream) {
    if (call.sequences == 0) return;
    auto* s = reinterpret_cast<cudaStream_t>(stream);
    const bool narrow = call.residual_type == type_bfloat16;
    if (narrow && call.tf32) launch<bfloat16, true>(call, s);
    if (narrow && !call.tf32) launch<bfloat16, false>(call, s);
    if (!narrow && call.tf32) launch<float, true>(call, s);
    if (!narrow && !call.tf32) launch<float, false>(call, s);
    check_launch("tokenize");
}

}  // namespace normwear::cuda
