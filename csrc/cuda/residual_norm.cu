#include "check.cuh"
#include "residual_norm.cuh"

namespace normwear::cuda {

namespace {

template <class Residual, class Update, int V, int Loads, int Warps>
__global__ void __launch_bounds__(norm_threads) residual_norm_kernel(const ResidualNorm call) {
    __shared__ float shared[norm_threads / warp_size];
    DeviceBlock block;
    residual_norm_body<DeviceBlock, Residual, Update, V, Loads, Warps>(block, call, shared);
}

template <class Residual, class Update>
void launch(const ResidualNorm& call, cudaStream_t stream) {
    with_norm_shape(call.width, [&](auto shape) {
        using Shape = decltype(shape);
        const auto blocks = static_cast<unsigned>((call.rows + Shape::rows - 1) / Shape::rows);
        residual_norm_kernel<Residual, Update, Shape::values, Shape::loads, Shape::warps>
            <<<blocks, norm_threads, 0, stream>>>(call);
    });
}

}  // namespace

void residual_norm(const ResidualNorm& call, std::uintptr_t stream) {
    if (call.rows == 0) return;
    auto* s = reinterpret_cast<cudaStream_t>(stream);
    const bool narrow = call.residual_type == type_bfloat16;
    const bool narrow_update = call.update_type == type_bfloat16;
    if (narrow && narrow_update) launch<bfloat16, bfloat16>(call, s);
    if (narrow && !narrow_update) launch<bfloat16, float>(call, s);
    if (!narrow && narrow_update) launch<float, bfloat16>(call, s);
    if (!narrow && !narrow_update) launch<float, float>(call, s);
    check_launch("residual_norm");
}

}  // namespace normwear::cuda
