#include "cpu/kernels/temporal_attention.h"

#include <algorithm>
#include <cmath>

#include "cpu/common/scratch.h"
#include "cpu/common/tensor.h"
#include "cpu/ops.h"

namespace tvk {
namespace {

TemporalAttention::View view(const Tensor& x) {
    return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4)};
}

// The arguments; what the outputs are is left to say.
void prepare(TemporalAttention& a, const Tensor& q, const Tensor& k, const Tensor& v,
             std::optional<double> scale) {
    a.dtype = dtype_of(q);
    a.batch = q.size(0), a.frames = q.size(1), a.tokens = q.size(2);
    a.heads = q.size(3), a.dim = q.size(4);
    a.q = view(q), a.k = view(k), a.v = view(v);
    a.scale = static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(a.dim))));
    // Runs of about 640 bytes: whole cache lines of every frame, and three tensors of 8 frames
    // stay in L1.
    a.group = std::min(a.heads, std::max<int64_t>(1, 160 / a.dim));
}

// Calls `run` for all tasks, in threads where they are worth it.
template <typename A, typename F>
void each_task(const A& a, F run) {
    const int64_t work = a.group * a.dim * a.frames * (a.frames + 8);
    parallel_for(0, a.tasks(), std::max<int64_t>(1, 400000 / work),
                 [&](int64_t begin, int64_t end) {
                     Scratch scratch(a.scratch_floats());
                     run(a, begin, end, scratch.data());
                 });
}

}  // namespace

Tensor temporal_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                          std::optional<double> scale) {
    STD_TORCH_CHECK(q.dim() == 5, "q is [B, F, N, H, D]");
    check_same(k, q, "k"), check_same(v, q, "v");
    Tensor out = empty_contiguous_like(q);
    if (out.numel() == 0) {
        return out;
    }
    TemporalAttention a = {};
    prepare(a, q, k, v, scale);
    a.out = out.mutable_data_ptr();
    auto run = best_temporal_attention();
#if TVK_X86
    // Half of the wider vectors would be empty: 566 ns a head and position against 472 with AVX2,
    // 8 frames, head dim 80, float32, all in L2 (EPYC 9004).
    if (level() == Level::avx512 && a.frames <= 8) {
        run = avx2::temporal_attention;
    }
#endif
    each_task(a, run);
    return out;
}

std::tuple<Tensor, Tensor, Tensor> temporal_attention_backward(const Tensor& grad, const Tensor& q,
                                                               const Tensor& k, const Tensor& v,
                                                               std::optional<double> scale) {
    STD_TORCH_CHECK(q.dim() == 5, "q is [B, F, N, H, D]");
    check_same(k, q, "k"), check_same(v, q, "v"), check_same(grad, q, "grad");
    Tensor dq = empty_contiguous_like(q), dk = empty_contiguous_like(k);
    Tensor dv = empty_contiguous_like(v);
    if (dq.numel() == 0) {
        return {dq, dk, dv};
    }
    TemporalAttentionBackward a = {};
    prepare(a, q, k, v, scale);
    a.grad = view(grad);
    a.out = dq.mutable_data_ptr(), a.dk = dk.mutable_data_ptr(), a.dv = dv.mutable_data_ptr();
    auto run = best_temporal_attention_backward();
#if TVK_X86
    if (level() == Level::avx512 && a.frames <= 8) {
        run = avx2::temporal_attention_backward;
    }
#endif
    each_task(a, run);
    return {dq, dk, dv};
}

}  // namespace tvk
