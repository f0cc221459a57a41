// Every CUDA op's entry; defined in ops/<op>.cu, registered in bindings_cuda.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace tvk {

using torch::stable::Tensor;

Tensor clip_group_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups,
                       double eps, bool silu);
Tensor guided_ddim_step(const Tensor& sample, const Tensor& noise, const Tensor& step,
                        const std::optional<Tensor>& mask,
                        const std::optional<Tensor>& background);
bool has_code(int64_t device);
Tensor shift_restricted_temporal_attention(const Tensor& z, const Tensor& w_q, const Tensor& w_k,
                                           const Tensor& w_v, const Tensor& w_out,
                                           const std::optional<Tensor>& bias,
                                           const Tensor& sigma_v, const Tensor& sigma_out,
                                           int64_t heads);
Tensor temporal_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale);

}  // namespace tvk
