#include "cpu/kernels/clip_group_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/common/group_norm.h"
#include "cpu/common/scratch.h"
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

// What both directions begin with: the checks, and the statistics of an x that is not empty.
struct Call {
    ClipGroupNorm a = {};
    Tensor weight, bias;  // contiguous
    std::vector<double> moments;
    std::vector<float> mean, rstd;

    Call(const Tensor& x, const Tensor& w, const Tensor& b, int64_t groups, double eps,
         bool silu) {
        weight = torch::stable::contiguous(w), bias = torch::stable::contiguous(b);
        describe(a, x, weight, bias, groups);
        a.silu = silu;
        if (x.numel() == 0) {
            return;
        }
        moments.resize(2 * a.tasks());
        mean.resize(a.batch * groups), rstd.resize(a.batch * groups);
        a.moments = moments.data(), a.mean = mean.data(), a.rstd = rstd.data();
        each_task(best_clip_group_norm_moments());
        combine(a, eps, mean, rstd);
    }

    template <typename Run>
    void each_task(Run* run) {
        // 32768 numbers are about 20 us; fewer are not worth waking another thread.
        const int64_t grain = std::max<int64_t>(1, 32768 / (a.group_channels() * a.plane()));
        parallel_for(0, a.tasks(), grain, [&](int64_t begin, int64_t end) {
            Scratch scratch(2 * a.BLOCK);
            run(a, begin, end, scratch.data());
        });
    }
};

}  // namespace

Tensor clip_group_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups,
                       double eps, bool silu) {
    Call call(x, weight, bias, groups, eps, silu);
    Tensor out = empty_contiguous_like(x);
    if (out.numel() != 0) {
        call.a.out = out.mutable_data_ptr();
        call.each_task(best_clip_group_norm_apply());
    }
    return out;
}

std::tuple<Tensor, Tensor, Tensor> clip_group_norm_backward(const Tensor& grad, const Tensor& x,
                                                            const Tensor& weight,
                                                            const Tensor& bias, int64_t groups,
                                                            double eps, bool silu) {
    Call call(x, weight, bias, groups, eps, silu);
    check_same(grad, x, "grad");
    Tensor dx = empty_contiguous_like(x), dweight = empty_contiguous_like(weight),
           dbias = empty_contiguous_like(bias);
    if (dx.numel() == 0) {
        return {dx, torch::stable::zero_(dweight), torch::stable::zero_(dbias)};
    }
    ClipGroupNorm& a = call.a;
    std::vector<double> sums(2 * a.batch * a.frames * a.channels);
    std::vector<float> lost(2 * a.batch * a.groups);
    a.grad = clip(grad);
    a.sums = sums.data(), a.lost = lost.data();
    a.out = dx.mutable_data_ptr();
    a.dweight = dweight.mutable_data_ptr(), a.dbias = dbias.mutable_data_ptr();
    call.each_task(best_clip_group_norm_sums());
    best_clip_group_norm_merge()(a, 0, a.groups, nullptr);
    call.each_task(best_clip_group_norm_differentiate());
    return {dx, dweight, dbias};
}

}  // namespace tvk
