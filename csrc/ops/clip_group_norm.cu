#include "kernels/clip_group_norm.cuh"
#include "ops/ops.h"
#include "ops/tensor.h"

namespace tvk {

Tensor clip_group_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups,
                       double eps, bool silu) {
    STD_TORCH_CHECK(x.dim() == 5, "x is [B, F, C, h, w]");
    check_like(weight, x, "weight");
    check_like(bias, x, "bias");
    const int64_t channels = x.size(2);
    STD_TORCH_CHECK(groups >= 1 && channels % groups == 0, "groups do not divide the channels");
    for (const Tensor* y : {&weight, &bias}) {
        STD_TORCH_CHECK(y->dim() == 1 && y->size(0) == channels, "weight and bias are [C]");
    }
    Tensor out = torch::stable::new_empty(x, x.sizes());
    if (out.numel() == 0) {
        return out;
    }
    ClipGroupNorm a = {};
    int* sizes[] = {&a.batches, &a.frames, &a.channels, &a.height, &a.width};
    for (int d = 0; d < 5; ++d) {
        *sizes[d] = checked_int(x.size(d), "a size");
        a.stride[d] = x.stride(d);
    }
    checked_int(out.numel() / a.batches, "the number of a clip's elements");
    a.groups = checked_int(groups, "groups");
    a.x = x.const_data_ptr();
    a.weight = weight.const_data_ptr();
    a.bias = bias.const_data_ptr();
    a.weight_stride = weight.stride(0);
    a.bias_stride = bias.stride(0);
    a.out = out.mutable_data_ptr();
    a.eps = static_cast<float>(eps);
    a.silu = silu;
    const int64_t partials = clip_group_norm_partials(a, x.element_size());
    const int64_t floats[] = {4 * partials + 2 * a.batches * groups};
    Tensor scratch = torch::stable::new_empty(x, floats, ScalarType::Float);
    a.partial = static_cast<float4*>(scratch.mutable_data_ptr());
    a.statistics = reinterpret_cast<float2*>(a.partial + partials);

    const OnDevice here(x);
    const auto run = [&](auto zero) {
        return launch_clip_group_norm<decltype(zero)>(a, here.stream());
    };
    check_launch(by_type(x, run), "clip_group_norm");
    return out;
}

}  // namespace tvk
