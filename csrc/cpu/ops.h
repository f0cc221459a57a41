// Every CPU op's entry, one line an op; defined in cpu/<op>.cpp, registered in bindings_cpu.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace tvk {

using torch::stable::Tensor;

// clang-format off
Tensor guided_ddim_step(const Tensor& sample, const Tensor& noise, const Tensor& step, const std::optional<Tensor>& mask, const std::optional<Tensor>& background);
Tensor clip_group_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double eps, bool silu);
std::tuple<Tensor, Tensor, Tensor> clip_group_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double eps, bool silu);
Tensor temporal_attention(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale);
std::tuple<Tensor, Tensor, Tensor> temporal_attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale);
std::tuple<Tensor, Tensor> frame_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& row_ptr, const Tensor& segments, std::vector<int64_t> levels, int64_t h, int64_t w, std::optional<double> scale, bool return_lse);
std::tuple<Tensor, Tensor, Tensor> frame_attention_backward(const Tensor& grad, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& row_ptr, const Tensor& segments, std::vector<int64_t> levels, int64_t h, int64_t w, std::optional<double> scale);
std::tuple<Tensor, Tensor> token_map_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& tokens, std::optional<double> scale);
Tensor shift_restricted_temporal_attention(const Tensor& z, const Tensor& w_q, const Tensor& w_k, const Tensor& w_v, const Tensor& w_out, const std::optional<Tensor>& bias, int64_t heads);
Tensor temporal_group_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double eps);
std::tuple<Tensor, Tensor, Tensor> temporal_group_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double eps);
std::string level_name();
// clang-format on

}  // namespace tvk
