// Matrix products by the BLAS that torch carries, through torch's dispatcher.
#pragma once

#include <array>

#include "cpu/common/tensor.h"

namespace tvk {

// A view of dense rows: no owner, no autograd.
inline Tensor matrix(void* data, int64_t rows, int64_t columns, ScalarType dtype) {
    const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    return torch::stable::from_blob(data, {sizes, 2}, {strides, 2}, cpu, dtype);
}

// The transpose of a [rows, columns] tensor of any strides, as a view without autograd.
inline Tensor transposed(const Tensor& x) {
    const int64_t sizes[] = {x.size(1), x.size(0)}, strides[] = {x.stride(1), x.stride(0)};
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    return torch::stable::from_blob(const_cast<void*>(x.const_data_ptr()), {sizes, 2},
                                    {strides, 2}, cpu, x.scalar_type());
}

// out = a b.
inline void matmul(const Tensor& a, const Tensor& b, const Tensor& out) {
    std::array<StableIValue, 3> stack{torch::stable::detail::from(a),
                                      torch::stable::detail::from(b),
                                      torch::stable::detail::from(out)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // the same tensor again, to be released
}

}  // namespace tvk
