// Storage types of tensors and the switch over them. Knows no torch.
#pragma once

#include <cstdint>

namespace tvk {

struct bf16 {
    uint16_t bits;
};

struct f16 {
    uint16_t bits;
};

enum class DType { f32, bf16, f16 };

// Calls run with a null pointer of the storage type: switch_dtype(t, [&](auto* p) { ... }).
template <typename F>
inline void switch_dtype(DType dtype, F run) {
    switch (dtype) {
        case DType::f32:
            return run(static_cast<float*>(nullptr));
        case DType::bf16:
            return run(static_cast<bf16*>(nullptr));
        case DType::f16:
            return run(static_cast<f16*>(nullptr));
    }
}

}  // namespace tvk
