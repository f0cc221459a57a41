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
Tensor temporal_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale);

}  // namespace tvk
