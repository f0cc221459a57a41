// Attention over the frames of a position in one warp's registers, from scores to weighted sums.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/common/numbers.cuh"
#include "kernels/common/ptx.cuh"

namespace tvk {

constexpr float LOG2_E = 1.4426950408889634f;

// Scores of 16 M queries and as many keys: [row block][8 keys][lane's four, see ptx.cuh].
template <int M>
using Scores = float[M][2 * M][4];

// What each query gives to each key: [16 queries][16 keys][register].
template <int M>
using Shares = uint32_t[M][M][4];

// Softmax over the known keys, as operand A of the second product: [row block][16 keys][register].
// `pairs`: rows 0 to 7 and 8 to 15 are two positions that know nothing of each other.
template <class T, int M>
__device__ inline void softmax(Scores<M>& scores, int frames, float scale, Shares<M>& shares,
                               bool pairs = false) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // rows g and g + 8
            float top = -INFINITY;
#pragma unroll
            for (int n = 0; n < 2 * M; ++n) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    const int key = 2 * t + i % 2;
                    const bool known = pairs ? n == half && key < frames : 8 * n + key < frames;
                    scores[m][n][i] = known ? scores[m][n][i] * scale : -INFINITY;
                    top = fmaxf(top, scores[m][n][i]);
                }
            }
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            float total = 0;
#pragma unroll
            for (int n = 0; n < 2 * M; ++n) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    scores[m][n][i] = exp2f(scores[m][n][i] - top);
                    total += scores[m][n][i];
                }
            }
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            const float share = __fdividef(1.0f, total);  // total is from 1 to 32
#pragma unroll
            for (int n = 0; n < 2 * M; ++n) {
                // Keys 2t and 2t + 1 of the lower, then of the upper eight: registers 0, 2; below
                // them, for rows g + 8, 1 and 3.
                shares[m][n / 2][n % 2 * 2 + half] =
                    pack(scores[m][n][2 * half] * share, scores[m][n][2 * half + 1] * share, T());
            }
        }
    }
}

// Adds the shares of 8 columns of V, of which a lane has columns 2t and 2t + 1 of keys g, g + 8,
// ...
template <class T, int M>
__device__ inline void add_shared(float (&sums)[M][4], const Shares<M>& shares,
                                  const uint32_t (&values)[2 * M]) {
#pragma unroll
    for (int n = 0; n < M; ++n) {
        const uint32_t lower = transpose(values[2 * n]);
        const uint32_t upper = transpose(values[2 * n + 1]);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            const auto& a = shares[m][n];
            mma16<T>(sums[m], a[0], a[1], a[2], a[3], lower, upper);
        }
    }
}

}  // namespace tvk
