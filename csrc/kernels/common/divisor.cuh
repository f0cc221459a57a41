// Division by a number that all threads share: a multiplication and a shift.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace tvk {

// Granlund and Montgomery 1994, "Division by invariant integers using multiplication", fig. 4.1,
// for numbers below 2^31.
struct Divisor {
    uint32_t by = 1, magic = 1, shift = 0;

    Divisor() = default;
    explicit Divisor(uint32_t divisor) : by(divisor) {
        while ((uint64_t{1} << shift) < by) {
            ++shift;
        }
        magic =
            static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - by)) / by + 1);
    }

    // Quotient of n, and the remainder left in n.
    __device__ uint32_t split(uint32_t& n) const {
        const uint32_t quotient = (__umulhi(n, magic) + n) >> shift;
        n -= quotient * by;
        return quotient;
    }
};

}  // namespace tvk
