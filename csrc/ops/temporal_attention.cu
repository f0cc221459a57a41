#include "kernels/temporal_attention.cuh"
#include "ops/ops.h"
#include "ops/tensor.h"

namespace tvk {

Tensor temporal_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
    STD_TORCH_CHECK(q.dim() == 5 && k.dim() == 5 && v.dim() == 5, "q is [B, F, N, H, D]");
    check_like(k, q, "k");
    check_like(v, q, "v");
    Tensor out = torch::stable::new_empty(q, q.sizes());
    if (out.numel() == 0) {
        return out;
    }
    TemporalAttention p = {};
    const Tensor* operands[] = {&q, &k, &v, &out};
    int* sizes[] = {&p.batches, &p.frames, &p.positions, &p.heads, &p.head_dim};
    for (int d = 0; d < 5; ++d) {
        *sizes[d] = checked_int(q.size(d), "a size");
        STD_TORCH_CHECK(k.size(d) == q.size(d) && v.size(d) == q.size(d),
                        "q, k and v share one shape");
        for (int x = 0; x < p.OPERANDS; ++x) {
            p.stride[x][d] = operands[x]->stride(d);
        }
    }
    STD_TORCH_CHECK(p.frames <= temporal::MOST_FRAMES, "more than 32 frames");
    STD_TORCH_CHECK(p.head_dim <= temporal::MOST_HEAD_DIM, "a head dim above 160");
    for (int x = 0; x < 3; ++x) {
        p.data[x] = operands[x]->const_data_ptr();
    }
    p.out = out.mutable_data_ptr();
    p.scale = static_cast<float>(scale);

    const OnDevice here(q);
    const auto run = [&](auto zero) {
        return launch_temporal_attention<decltype(zero)>(p, here.stream());
    };
    check_launch(by_type(q, run), "temporal_attention");
    return out;
}

}  // namespace tvk
