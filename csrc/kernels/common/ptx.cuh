// The instructions of sm_80 and newer, of tensor cores and for them, that C++ has no words for.
//
// Fragments as in the PTX ISA, "Warp Level Matrix Multiply-Accumulate", .m16n8k16 and .m16n8k8:
// lane = 4 * g + t holds, of A [16, k], rows g (registers 0, 2) and g + 8 (1, 3), columns 2t,
// 2t + 1 (0, 1) and 8 more (2, 3); of B [k, 8], rows as A's columns, column g; of the result
// [16, 8], rows g (0, 1) and g + 8 (2, 3), columns 2t and 2t + 1.
//
// All lanes of a warp take part, hence volatile: none of these may sink into a branch. Copies to
// shared memory are each thread's own.
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

// threadIdx.x, read again: what is computed from it is not kept in registers from one use to the
// next.
__device__ inline unsigned fresh_thread() {
    unsigned x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

// Two or four 8 x 8 matrices of 16-bit elements from shared memory: lane 8i + r gives the address
// of row r of matrix i, aligned to 16 bytes, and lane 4g + t gets row g, columns 2t and 2t + 1 of
// each ("ldmatrix").
__device__ inline void load_matrices(const void* row, uint32_t (&to)[2]) {
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(at));
}

__device__ inline void load_matrices(const void* row, uint32_t (&to)[4]) {
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at));
}

// 16 bytes from global to shared memory, at the latest when they are waited for; zeros, and
// nothing read, where `known` is false ("cp.async").
__device__ inline void copy_async(void* to, const void* from, bool known) {
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at),
                 "l"(__cvta_generic_to_global(from)), "r"(known ? 16 : 0)
                 : "memory");
}

// Ends a group of this thread's copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all of this thread's groups but the last N.
template <int N>
__device__ inline void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace tvk
