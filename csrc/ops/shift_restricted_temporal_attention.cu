#include <cmath>

#include "kernels/shift_restricted_temporal_attention.cuh"
#include "ops/ops.h"
#include "ops/tensor.h"

namespace tvk {

Tensor shift_restricted_temporal_attention(const Tensor& z, const Tensor& w_q, const Tensor& w_k,
                                           const Tensor& w_v, const Tensor& w_out,
                                           const std::optional<Tensor>& bias,
                                           const Tensor& sigma_v, const Tensor& sigma_out,
                                           int64_t heads) {
    STD_TORCH_CHECK(z.dim() == 4, "z is [B, F, N, C]");
    STD_TORCH_CHECK(z.element_size() == 2, "float16 or bfloat16 is needed");
    const int64_t channels = z.size(3);
    STD_TORCH_CHECK(heads >= 1 && channels % heads == 0, "heads do not divide the channels");
    STD_TORCH_CHECK(heads <= stam::MOST_HEADS, "more than 8 heads");
    STD_TORCH_CHECK(channels / heads <= stam::HEAD, "a head dim above 40");
    STD_TORCH_CHECK(channels % 8 == 0, "channels that are no multiple of 8");
    STD_TORCH_CHECK(z.size(1) <= stam::MOST_FRAMES, "more than 32 frames");
    ShiftRestrictedTemporalAttention p = {};
    const Tensor* weights[] = {&w_q, &w_k, &w_v, &w_out};
    for (int x = 0; x < p.WEIGHTS; ++x) {
        const Tensor& w = *weights[x];
        check_like(w, z, "a weight");
        STD_TORCH_CHECK(w.dim() == 2 && w.size(0) == channels && w.size(1) == channels,
                        "a weight is [C, C]");
        p.weight[x] = w.const_data_ptr();
        checked_int(channels * w.stride(0), "a weight's last row");
        p.weight_stride[x] = static_cast<int>(w.stride(0));
        STD_TORCH_CHECK(channels == 0 ||
                            (aligned(p.weight[x], 16) && w.stride(1) == 1 && w.stride(0) % 8 == 0),
                        "rows of a weight do not begin on 16 bytes");
    }
    if (bias.has_value()) {
        check_like(*bias, z, "bias");
        STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == channels, "bias is [C]");
        p.bias = bias->const_data_ptr();
        p.bias_stride = bias->stride(0);
    }
    for (const Tensor* sigma : {&sigma_v, &sigma_out}) {
        check_beside(*sigma, z, "a sigma");
        STD_TORCH_CHECK(sigma->numel() == 1 && sigma->scalar_type() == ScalarType::Float,
                        "a sigma is one float32 number");
    }
    p.sigma_v = static_cast<const float*>(sigma_v.const_data_ptr());
    p.sigma_out = static_cast<const float*>(sigma_out.const_data_ptr());
    Tensor out = torch::stable::new_empty(z, z.sizes());
    if (out.numel() == 0) {
        return out;
    }
    int* sizes[] = {&p.batches, &p.frames, &p.positions, &p.channels};
    for (int d = 0; d < 4; ++d) {
        *sizes[d] = checked_int(z.size(d), "a size");
        p.z_stride[d] = z.stride(d);
    }
    checked_int(z.size(0) * z.size(2), "the number of positions");
    p.heads = static_cast<int>(heads);
    p.scale = 1.0f / std::sqrt(static_cast<float>(channels / heads));
    p.z = z.const_data_ptr();
    p.out = out.mutable_data_ptr();

    const OnDevice here(z);
    const auto run = [&](auto zero) {
        if constexpr (sizeof(zero) == 2) {
            return launch_shift_restricted_temporal_attention<decltype(zero)>(p, here.stream());
        }
        return cudaErrorInvalidValue;
    };
    check_launch(by_type(z, run), "shift_restricted_temporal_attention");
    return out;
}

}  // namespace tvk
