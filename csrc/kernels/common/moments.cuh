// Count, mean and sum of centred squares, and their merge over a block: Chan, Golub and LeVeque,
// "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
#pragma once

#include <cuda_runtime.h>

namespace tvk {

struct Moments {
    float count, mean, squares;
};

__device__ inline Moments merge(const Moments& a, const Moments& b) {
    const float count = a.count + b.count;
    const float share = count > 0 ? b.count / count : 0;
    const float away = b.mean - a.mean;
    return {count, a.mean + away * share, a.squares + b.squares + away * away * a.count * share};
}

template <int THREADS>
struct BlockMoments {
    Moments at[THREADS / 32];
};

// The moments of all threads, for all threads.
template <int THREADS>
__device__ inline Moments merge_block(Moments found, BlockMoments<THREADS>& scratch) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) {
        const Moments other = {__shfl_xor_sync(~0u, found.count, lane),
                               __shfl_xor_sync(~0u, found.mean, lane),
                               __shfl_xor_sync(~0u, found.squares, lane)};
        found = merge(found, other);
    }
    if (threadIdx.x % 32 == 0) {
        scratch.at[threadIdx.x / 32] = found;
    }
    __syncthreads();
    Moments all = {};
    for (int warp = 0; warp < THREADS / 32; ++warp) {
        all = merge(all, scratch.at[warp]);
    }
    return all;
}

}  // namespace tvk
