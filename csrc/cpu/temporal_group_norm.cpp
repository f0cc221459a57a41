#include "cpu/kernels/temporal_group_norm.h"

#include <algorithm>
#include <vector>

#include "cpu/common/scratch.h"
#include "cpu/common/tensor.h"
#include "cpu/ops.h"

namespace tvk {
namespace {

TemporalGroupNorm::Clip clip(const Tensor& x) {
    return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4)};
}

// The checks of both directions, and what they read; weight and bias are contiguous.
TemporalGroupNorm describe(const Tensor& x, const Tensor& weight, const Tensor& bias,
                           int64_t groups, double eps) {
    STD_TORCH_CHECK(x.dim() == 5, "x is [B, F, C, h, w]");
    const int64_t channels = x.size(2);
    STD_TORCH_CHECK(groups > 0 && channels % groups == 0, "groups do not divide the channels");
    for (const Tensor* per_channel : {&weight, &bias}) {
        check_like(*per_channel, x, "weight or bias");
        STD_TORCH_CHECK(per_channel->dim() == 1 && per_channel->size(0) == channels,
                        "weight and bias are [C]");
    }
    TemporalGroupNorm a = {};
    a.dtype = dtype_of(x);
    a.batch = x.size(0), a.frames = x.size(1), a.channels = channels;
    a.height = x.size(3), a.width = x.size(4), a.groups = groups;
    a.x = clip(x);
    a.weight = weight.const_data_ptr(), a.bias = bias.const_data_ptr();
    a.eps = static_cast<float>(eps);
    return a;
}

template <typename Run>
void each_task(const TemporalGroupNorm& a, int64_t scratches, Run* run) {
    // As for clip_group_norm: fewer numbers are not worth waking another thread.
    const int64_t grain = std::max<int64_t>(1, 32768 / a.held());
    parallel_for(0, a.tasks(), grain, [&](int64_t begin, int64_t end) {
        run(a, begin, end, Scratch(scratches * a.held()).data());
    });
}

}  // namespace

Tensor temporal_group_norm(const Tensor& x, const Tensor& weight, const Tensor& bias,
                           int64_t groups, double eps) {
    const Tensor w = torch::stable::contiguous(weight), b = torch::stable::contiguous(bias);
    TemporalGroupNorm a = describe(x, w, b, groups, eps);
    Tensor out = empty_contiguous_like(x);
    if (out.numel() != 0) {
        a.out = out.mutable_data_ptr();
        each_task(a, 1, best_temporal_group_norm());
    }
    return out;
}

std::tuple<Tensor, Tensor, Tensor> temporal_group_norm_backward(const Tensor& grad,
                                                                const Tensor& x,
                                                                const Tensor& weight,
                                                                const Tensor& bias, int64_t groups,
                                                                double eps) {
    const Tensor w = torch::stable::contiguous(weight), b = torch::stable::contiguous(bias);
    TemporalGroupNorm a = describe(x, w, b, groups, eps);
    check_like(grad, x, "grad");
    STD_TORCH_CHECK(grad.dim() == 5, "grad is [B, F, C, h, w]");
    for (int64_t d = 0; d < 5; ++d) {
        STD_TORCH_CHECK(grad.size(d) == x.size(d), "grad has another shape than x");
    }
    Tensor dx = empty_contiguous_like(x), dweight = empty_contiguous_like(weight),
           dbias = empty_contiguous_like(bias);
    if (dx.numel() == 0) {
        return {dx, torch::stable::zero_(dweight), torch::stable::zero_(dbias)};
    }
    std::vector<double> sums(2 * a.tasks() * a.group_channels());
    a.grad = clip(grad), a.sums = sums.data(), a.out = dx.mutable_data_ptr();
    a.dweight = dweight.mutable_data_ptr(), a.dbias = dbias.mutable_data_ptr();
    each_task(a, 2, best_temporal_group_norm_differentiate());
    best_temporal_group_norm_merge()(a, 0, a.groups);
    return {dx, dweight, dbias};
}

}  // namespace tvk
