#include "cpu/kernels/temporal_group_norm.h"

#include <algorithm>
#include <vector>

#include "cpu/common/group_norm.h"
#include "cpu/common/scratch.h"
#include "cpu/ops.h"

namespace tvk {
namespace {

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
    TemporalGroupNorm a = {};
    describe(a, x, w, b, groups);
    a.eps = static_cast<float>(eps);
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
    TemporalGroupNorm a = {};
    describe(a, x, w, b, groups);
    a.eps = static_cast<float>(eps);
    check_same(grad, x, "grad");
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
