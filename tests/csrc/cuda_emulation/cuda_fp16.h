// float16 for the host emulation: storage and roundings, no arithmetic.
#pragma once

#include <cuda_runtime.h>

struct __half {
    uint16_t bits;
};
struct __half2 {
    __half x, y;
};

inline float __half2float(__half x) {
    _Float16 value;
    std::memcpy(&value, &x, 2);
    return static_cast<float>(value);
}

inline __half __float2half_rn(float x) {
    const _Float16 value = static_cast<_Float16>(x);
    __half found;
    std::memcpy(&found, &value, 2);
    return found;
}

inline __half2 __floats2half2_rn(float x, float y) {
    return {__float2half_rn(x), __float2half_rn(y)};
}
