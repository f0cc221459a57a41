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

}  // namespace

Tensor temporal_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                          std::optional<double> scale) {
    STD_TORCH_CHECK(q.dim() == 5, "q is [B, F, N, H, D]");
    for (const Tensor* x : {&k, &v}) {
        check_like(*x, q, "k or v");
        STD_TORCH_CHECK(
            std::equal(q.sizes().begin(), q.sizes().end(), x->sizes().begin(), x->sizes().end()),
            "q, k, v share one shape");
    }
    Tensor out = empty_contiguous_like(q);
    if (out.numel() == 0) {
        return out;
    }
    TemporalAttention a = {};
    a.dtype = dtype_of(q);
    a.batch = q.size(0), a.frames = q.size(1), a.tokens = q.size(2);
    a.heads = q.size(3), a.dim = q.size(4);
    a.q = view(q), a.k = view(k), a.v = view(v);
    a.out = out.mutable_data_ptr();
    a.scale = static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(a.dim))));
    // Runs of about 640 bytes: whole cache lines of every frame, and three tensors of 8 frames
    // stay in L1.
    a.group = std::min(a.heads, std::max<int64_t>(1, 160 / a.dim));
    auto run = best_temporal_attention();
#if TVK_X86
    // Half of the wider vectors would be empty: 566 ns a head and position against 472 with AVX2,
    // 8 frames, head dim 80, float32, all in L2 (EPYC 9004).
    if (level() == Level::avx512 && a.frames <= 8) {
        run = avx2::temporal_attention;
    }
#endif
    const int64_t work = a.group * a.dim * a.frames * (a.frames + 8);
    parallel_for(0, a.tasks(), std::max<int64_t>(1, 400000 / work),
                 [&](int64_t begin, int64_t end) {
                     Scratch scratch(a.scratch_floats());
                     run(a, begin, end, scratch.data());
                 });
    return out;
}

}  // namespace tvk
