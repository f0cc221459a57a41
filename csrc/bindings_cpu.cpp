// Schemas and implementations of the namespace tvkernels_cpu, one line an op; nothing else.

#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"

#define TVK_CPU_OP(name, schema)                                             \
    STABLE_TORCH_LIBRARY_FRAGMENT(tvkernels_cpu, m) { m.def(#name schema); } \
    STABLE_TORCH_LIBRARY_IMPL(tvkernels_cpu, CPU, m) { m.impl(#name, TORCH_BOX(&tvk::name)); }

// clang-format off
TVK_CPU_OP(guided_ddim_step, "(Tensor sample, Tensor noise, Tensor step, Tensor? mask, Tensor? background) -> Tensor")
TVK_CPU_OP(clip_group_norm, "(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu) -> Tensor")
TVK_CPU_OP(clip_group_norm_backward, "(Tensor grad, Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu) -> (Tensor, Tensor, Tensor)")
TVK_CPU_OP(temporal_attention, "(Tensor q, Tensor k, Tensor v, float? scale) -> Tensor")
TVK_CPU_OP(temporal_attention_backward, "(Tensor grad, Tensor q, Tensor k, Tensor v, float? scale) -> (Tensor, Tensor, Tensor)")
TVK_CPU_OP(frame_attention, "(Tensor q, Tensor k, Tensor v, Tensor row_ptr, Tensor segments, int[] levels, int h, int w, float? scale, bool return_lse) -> (Tensor, Tensor)")
TVK_CPU_OP(frame_attention_backward, "(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor row_ptr, Tensor segments, int[] levels, int h, int w, float? scale) -> (Tensor, Tensor, Tensor)")
TVK_CPU_OP(token_map_attention, "(Tensor q, Tensor k, Tensor v, Tensor tokens, float? scale) -> (Tensor, Tensor)")
TVK_CPU_OP(shift_restricted_temporal_attention, "(Tensor z, Tensor w_q, Tensor w_k, Tensor w_v, Tensor w_out, Tensor? bias, int heads) -> Tensor")
TVK_CPU_OP(temporal_group_norm, "(Tensor x, Tensor weight, Tensor bias, int groups, float eps) -> Tensor")
TVK_CPU_OP(temporal_group_norm_backward, "(Tensor grad, Tensor x, Tensor weight, Tensor bias, int groups, float eps) -> (Tensor, Tensor, Tensor)")
// clang-format on

// The instruction set in use: generic, avx2 or avx512.
STABLE_TORCH_LIBRARY_FRAGMENT(tvkernels_cpu, m) { m.def("level() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(tvkernels_cpu, CompositeExplicitAutograd, m) {
    m.impl("level", TORCH_BOX(&tvk::level_name));
}
