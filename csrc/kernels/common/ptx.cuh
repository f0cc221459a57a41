// The instructions of tensor cores for sm_80 and newer that C++ has no words for.
//
// Fragments as in the PTX ISA, "Warp Level Matrix Multiply-Accumulate", .m16n8k16 and .m16n8k8:
// lane = 4 * g + t holds, of A [16, k], rows g (registers 0, 2) and g + 8 (1, 3), columns 2t,
// 2t + 1 (0, 1) and 8 more (2, 3); of B [k, 8], rows as A's columns, column g; of the result
// [16, 8], rows g (0, 1) and g + 8 (2, 3), columns 2t and 2t + 1.
//
// All lanes of a warp take part, hence volatile: none of these may sink into a branch.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace tvk {

// d += a b over 16.
template <class T>
__device__ inline void mma16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                             uint32_t b0, uint32_t b1) {
    if constexpr (!std::is_same_v<T, __half>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
}

// d += a b over 8.
template <class T>
__device__ inline void mma8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
    if constexpr (!std::is_same_v<T, __half>) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, "
            "{%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(b0));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, "
            "{%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(b0));
    }
}

// Of an 8 x 8 matrix of 16-bit elements lane 4g + t gives row g, columns 2t and 2t + 1, and gets
// column g, rows 2t and 2t + 1 ("movmatrix").
__device__ inline uint32_t transpose(uint32_t x) {
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

}  // namespace tvk
