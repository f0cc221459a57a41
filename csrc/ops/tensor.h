// What every op's torch side needs: kinds of elements, checks, the switch over storage types.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "kernels/common/numbers.cuh"
#include "ops/device.h"

namespace tvk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Kind kind_of(const Tensor& x, const char* what) {
    switch (x.scalar_type()) {
        case ScalarType::Bool:
            return Kind::boolean;
        case ScalarType::Half:
            return Kind::f16;
        case ScalarType::BFloat16:
            return Kind::bf16;
        case ScalarType::Float:
            return Kind::f32;
        case ScalarType::Double:
            return Kind::f64;
        default:
            STD_TORCH_CHECK(false, what, " has a dtype that no kernel reads");
    }
    return Kind::f32;
}

inline void check_beside(const Tensor& x, const Tensor& first, const char* what) {
    STD_TORCH_CHECK(x.device() == first.device(), what, " is on another device");
}

inline void check_like(const Tensor& x, const Tensor& first, const char* what) {
    check_beside(x, first, what);
    STD_TORCH_CHECK(x.scalar_type() == first.scalar_type(), what, " has another dtype");
}

// Calls run with a number of x's storage type: by_type(x, [&](auto zero) { ... }).
template <class Run>
inline cudaError_t by_type(const Tensor& x, Run run) {
    switch (x.scalar_type()) {
        case ScalarType::Half:
            return run(__half());
        case ScalarType::BFloat16:
            return run(__nv_bfloat16());
        case ScalarType::Float:
            return run(float());
        default:
            STD_TORCH_CHECK(false, "float16, bfloat16 or float32 is needed");
    }
    return cudaErrorInvalidValue;
}

inline void check_launch(cudaError_t error, const char* op) {
    STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

inline int checked_int(int64_t x, const char* what) {
    STD_TORCH_CHECK(x <= INT32_MAX, what, " is beyond 2^31 - 1");
    return static_cast<int>(x);
}

}  // namespace tvk
