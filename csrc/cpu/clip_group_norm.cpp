#include "cpu/kernels/clip_group_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/common/scratch.h"
#include "cpu/common/tensor.h"
#include "cpu/ops.h"

namespace tvk {
namespace {

// Mean and 1 / sqrt(var + eps) of every batch and group, from the moments of the frames.
void combine(const ClipGroupNorm& a, double eps, std::vector<float>& mean,
             std::vector<float>& rstd) {
    const double n = static_cast<double>(a.group_channels() * a.plane());
    for (int64_t b = 0; b < a.batch; ++b) {
        for (int64_t g = 0; g < a.groups; ++g) {
            double count = 0, middle = 0, squares = 0;
            for (int64_t f = 0; f < a.frames; ++f) {
                const double* found = a.moments + 2 * ((b * a.frames + f) * a.groups + g);
                const double apart = found[0] - middle, total = count + n;
                middle += apart * n / total;
                squares += found[1] + apart * apart * count * n / total;
                count = total;
            }
            mean[b * a.groups + g] = static_cast<float>(middle);
            rstd[b * a.groups + g] = static_cast<float>(1 / std::sqrt(squares / count + eps));
        }
    }
}

}  // namespace

Tensor clip_group_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups,
                       double eps, bool silu) {
    STD_TORCH_CHECK(x.dim() == 5, "x is [B, F, C, h, w]");
    const int64_t channels = x.size(2);
    STD_TORCH_CHECK(groups > 0 && channels % groups == 0, "groups do not divide the channels");
    for (const Tensor* per_channel : {&weight, &bias}) {
        check_like(*per_channel, x, "weight or bias");
        STD_TORCH_CHECK(per_channel->dim() == 1 && per_channel->size(0) == channels,
                        "weight and bias are [C]");
    }
    Tensor out = empty_contiguous_like(x);
    if (out.numel() == 0) {
        return out;
    }
    const Tensor w = torch::stable::contiguous(weight), b = torch::stable::contiguous(bias);
    ClipGroupNorm a = {};
    a.dtype = dtype_of(x);
    a.batch = x.size(0), a.frames = x.size(1), a.channels = channels;
    a.height = x.size(3), a.width = x.size(4), a.groups = groups;
    a.x = {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4)};
    a.weight = w.const_data_ptr(), a.bias = b.const_data_ptr();
    a.out = out.mutable_data_ptr();
    a.silu = silu;

    std::vector<double> moments(2 * a.tasks());
    std::vector<float> mean(a.batch * groups), rstd(a.batch * groups);
    a.moments = moments.data(), a.mean = mean.data(), a.rstd = rstd.data();
    const auto each_task = [&](auto* run) {
        // 32768 numbers are about 20 us; fewer are not worth waking another thread.
        const int64_t grain = std::max<int64_t>(1, 32768 / (a.group_channels() * a.plane()));
        parallel_for(0, a.tasks(), grain, [&](int64_t begin, int64_t end) {
            Scratch scratch(a.BLOCK);
            run(a, begin, end, scratch.data());
        });
    };
    each_task(best_clip_group_norm_moments());
    combine(a, eps, mean, rstd);
    each_task(best_clip_group_norm_apply());
    return out;
}

}  // namespace tvk
