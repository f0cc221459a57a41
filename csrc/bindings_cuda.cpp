// Schemas and implementations of the namespace tvkernels_cuda, one line an op; nothing else.

#include <torch/csrc/stable/library.h>

#include "ops/ops.h"

// The tests build the same sources for the host, under another name.
#ifndef TVK_NAMESPACE
#define TVK_NAMESPACE tvkernels_cuda
#define TVK_DEVICE CUDA
#endif

#define TVK_LIBRARY(space, m) STABLE_TORCH_LIBRARY_FRAGMENT(space, m)
#define TVK_LIBRARY_IMPL(space, device, m) STABLE_TORCH_LIBRARY_IMPL(space, device, m)
#define TVK_OP(name, device, schema)                       \
    TVK_LIBRARY(TVK_NAMESPACE, m) { m.def(#name schema); } \
    TVK_LIBRARY_IMPL(TVK_NAMESPACE, device, m) { m.impl(#name, TORCH_BOX(&tvk::name)); }

// clang-format off
TVK_OP(clip_group_norm, TVK_DEVICE, "(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu) -> Tensor")
TVK_OP(guided_ddim_step, TVK_DEVICE, "(Tensor sample, Tensor noise, Tensor step, Tensor? mask, Tensor? background) -> Tensor")
TVK_OP(has_code, CompositeExplicitAutograd, "(int device) -> bool")
TVK_OP(shift_restricted_temporal_attention, TVK_DEVICE, "(Tensor z, Tensor w_q, Tensor w_k, Tensor w_v, Tensor w_out, Tensor? bias, Tensor sigma_v, Tensor sigma_out, int heads) -> Tensor")
TVK_OP(temporal_attention, TVK_DEVICE, "(Tensor q, Tensor k, Tensor v, float scale) -> Tensor")
// clang-format on
