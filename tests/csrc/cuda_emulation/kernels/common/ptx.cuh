// In place of csrc/kernels/common/ptx.cuh: the same instructions, computed from what all lanes of
// a warp hold. Written from the PTX ISA's figures of the fragments: element i of a lane's fragment
// of A, B and C is at the row and column that the functions below give.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace tvk {
namespace fragment {

inline float value(uint16_t bits, __half) { return __half2float({bits}); }
inline float value(uint16_t bits, __nv_bfloat16) { return __bfloat162float({bits}); }

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", group = lane / 4 and
// place = lane % 4 in its terms:
//   A: row = group for elements 0, 1, 4, 5, else group + 8; column = 2 place + i % 2, from
//      element 4 on 8 more
//   B: row = 2 place + i % 2, from element 2 on 8 more; column = group
//   C: row = group for elements 0, 1, else group + 8; column = 2 place + i % 2
// A and B of m16n8k8 are the first half of these.
inline int a_row(int lane, int i) { return lane / 4 + ((i & 2) ? 8 : 0); }
inline int a_column(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i < 4 ? 0 : 8); }
inline int b_row(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i < 2 ? 0 : 8); }
inline int b_column(int lane, int) { return lane / 4; }

template <class T, int K>
void multiply(float (&d)[4], const emulation::Shown& mine) {
    const emulation::Shown* shown = emulation::block->exchange(mine);
    // Of A only the rows and of B only the columns of this lane's results are looked at.
    const int lane = threadIdx.x % 32;
    float a[16][K], b[K][8];
    for (int from = 0; from < 32; ++from) {
        const auto* of_a = reinterpret_cast<const uint16_t*>(shown[from].word);
        const auto* of_b = reinterpret_cast<const uint16_t*>(shown[from].word + K / 4);
        for (int i = 0; a_row(from, 0) == lane / 4 && i < K / 2; ++i) {
            a[a_row(from, i)][a_column(from, i)] = value(of_a[i], T());
        }
        for (int i = 0; b_column(from, 0) / 2 == lane % 4 && i < K / 4; ++i) {
            b[b_row(from, i)][b_column(from, i)] = value(of_b[i], T());
        }
    }
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
        for (int k = 0; k < K; ++k) {
            d[i] += a[row][k] * b[k][column];
        }
    }
}

}  // namespace fragment

template <class T>
void mma16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
           uint32_t b1) {
    fragment::multiply<T, 16>(d, {{a0, a1, a2, a3, b0, b1}});
}

template <class T>
void mma8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
    fragment::multiply<T, 8>(d, {{a0, a1, b0}});
}

// PTX ISA, "movmatrix": before, each four lanes hold a row, two neighbours each; after, a column.
inline uint32_t transpose(uint32_t x) {
    const emulation::Shown* shown = emulation::block->exchange({{x}});
    const int lane = threadIdx.x % 32, column = lane / 4;
    uint32_t found = 0;
    for (int i = 0; i < 2; ++i) {
        const int from = lane % 4 * 2 + i;  // the source's row
        const uint32_t word = shown[4 * from + column / 2].word[0];
        found |= (word >> (column % 2 * 16) & 0xffff) << (16 * i);
    }
    return found;
}

inline unsigned fresh_thread() { return threadIdx.x; }

// PTX ISA, "ldmatrix": lanes 0 to 7 hold the rows' addresses of the first matrix, the next eight
// those of the second and so on; a lane gets two neighbours of the row that its place in the warp
// gives, as in a fragment of A.
template <int MATRICES>
void load_matrices(const void* row, uint32_t (&to)[MATRICES]) {
    emulation::Shown mine = {};
    std::memcpy(mine.word, &row, sizeof(row));
    const emulation::Shown* shown = emulation::block->exchange(mine);
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < MATRICES; ++i) {
        const char* from;
        std::memcpy(&from, shown[8 * i + lane / 4].word, sizeof(from));
        emulation::check_shared(from, 16);
        std::memcpy(&to[i], from + lane % 4 * 4, 4);
    }
}

// PTX ISA, "cp.async": nothing is promised before the wait, and nothing keeps a copy from landing
// at once. One order of threads does the one, the other the other.
inline void copy_async(void* to, const void* from, bool known) {
    emulation::check_shared(to, 16);
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) {
        emulation::fail("an asynchronous copy from an address that is not aligned");
    }
    emulation::block->copies().back().push_back({to, known ? from : nullptr});
    if (!emulation::backward()) {
        emulation::block->land(0);
    }
}

inline void commit_copies() { emulation::block->copies().emplace_back(); }

template <int N>
void wait_copies() {
    emulation::block->land(N + 1);  // the last one is still open
}

}  // namespace tvk
