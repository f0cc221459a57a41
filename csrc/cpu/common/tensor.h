// What the torch side of every CPU op needs: tensors, checks, outputs, parallel_for.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "cpu/common/dtype.h"
#include "cpu/common/level.h"

namespace tvk {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

// The storage type of a tensor; an error where no kernel here takes it.
inline DType dtype_of(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float:
            return DType::f32;
        case ScalarType::BFloat16:
            return DType::bf16;
        case ScalarType::Half:
            return DType::f16;
        default:
            STD_TORCH_CHECK(false, "float32, bfloat16 or float16 is needed");
    }
    return DType::f32;
}

inline void check_like(const Tensor& x, const Tensor& other, const char* what) {
    STD_TORCH_CHECK(x.is_cpu(), what, " is not on a CPU");
    STD_TORCH_CHECK(x.scalar_type() == other.scalar_type(), what, " has another dtype");
}

// Another of x's dtype and shape.
inline void check_same(const Tensor& x, const Tensor& other, const char* what) {
    check_like(x, other, what);
    const auto sizes = x.sizes(), expected = other.sizes();
    STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), what,
                    " has another shape");
}

// A new contiguous tensor of x's shape and dtype, not filled.
Tensor empty_contiguous_like(const Tensor& x);

}  // namespace tvk
