// What the torch side of both group norms, over a clip and over time, checks and reads.
#pragma once

#include "cpu/common/clip.h"
#include "cpu/common/tensor.h"

namespace tvk {

inline Clip clip(const Tensor& x) {
    return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4)};
}

// Fills what describes the arguments; weight and bias are contiguous.
template <typename Norm>
void describe(Norm& a, const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups) {
    STD_TORCH_CHECK(x.dim() == 5, "x is [B, F, C, h, w]");
    const int64_t channels = x.size(2);
    STD_TORCH_CHECK(groups > 0 && channels % groups == 0, "groups do not divide the channels");
    for (const Tensor* per_channel : {&weight, &bias}) {
        check_like(*per_channel, x, "weight or bias");
        STD_TORCH_CHECK(per_channel->dim() == 1 && per_channel->size(0) == channels,
                        "weight and bias are [C]");
    }
    a.dtype = dtype_of(x);
    a.batch = x.size(0), a.frames = x.size(1), a.channels = channels;
    a.height = x.size(3), a.width = x.size(4), a.groups = groups;
    a.x = clip(x);
    a.weight = weight.const_data_ptr(), a.bias = bias.const_data_ptr();
}

}  // namespace tvk
