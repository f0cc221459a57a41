// Attention over at most 32 frames at each position, q, k and v read in place: the problem is one
// of bytes, so each is read once, 16 bytes at a time, and the scores never leave the registers.
//
// A warp takes one head of one position, neighbouring warps its other heads: a block reads whole
// rows of all heads. For 16-bit types there is no shared memory at all. The sum over the head dim
// may run in any order, so a lane's 8 neighbours in memory serve as four columns of two products;
// the columns of V may come in any order as well, so the same lane ends with 8 neighbours of the
// result. Only V is transposed, 8 x 8 at a time, in registers.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "kernels/common/launch.cuh"
#include "kernels/common/numbers.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/common/rows.cuh"
#include "kernels/common/shares.cuh"

namespace tvk {

struct TemporalAttention {
    enum Operand { Q, K, V, OUT, OPERANDS };

    const void* data[3];  // q, k, v: [batches, frames, positions, heads, head_dim]
    void* out;
    int64_t stride[OPERANDS][5];
    int batches, frames, positions, heads, head_dim;  // at most 32 frames, head dim 160
    float scale;
    uint32_t items;  // batches * positions * heads, below 2^31; set by the launcher
};

namespace temporal {

constexpr int MOST_FRAMES = 32;
constexpr int MOST_HEAD_DIM = 160;
constexpr int WARPS = 8;  // the heads of a position in SD-1.x
constexpr int THREADS = 32 * WARPS;

// What a warp works on.
struct Item {
    int batch, position, head;
};

__device__ inline Item item_of(const TemporalAttention& p, uint32_t item) {
    const uint32_t cell = item / p.heads, batch = cell / p.positions;
    return {static_cast<int>(batch), static_cast<int>(cell - batch * p.positions),
            static_cast<int>(item - cell * p.heads)};
}

template <class T>
__device__ inline Rows<T> rows_of(const TemporalAttention& p, int operand, const Item& item,
                                  bool dense) {
    T* data = static_cast<T*>(operand == p.OUT ? p.out : const_cast<void*>(p.data[operand]));
    const int64_t* stride = p.stride[operand];
    data += item.batch * stride[0] + item.position * stride[2] + item.head * stride[3];
    return {data, stride[1], stride[4], p.frames, p.head_dim, dense};
}

// Adds the products over 8 R columns from c on; lane t has the 2 R from c + 2 R t on.
template <class T, int M, int R, bool EXACT>
__device__ inline void add_scores(Scores<M>& scores, const Rows<T>& q, const Rows<T>& k, int c) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    c += 2 * R * t;
    uint32_t a[2 * M][R], b[2 * M][R];  // rows g, g + 8, ...
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) {
        q.template read<R, EXACT>(g + 8 * i, c, a[i]);
        k.template read<R, EXACT>(g + 8 * i, c, b[i]);
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < 2 * M; ++n) {
            const auto &top = a[2 * m], &bottom = a[2 * m + 1], &keys = b[n];
            if constexpr (R == 1) {
                mma8<T>(scores[m][n], top[0], bottom[0], keys[0]);
            } else {
#pragma unroll
                for (int r = 0; r < R; r += 2) {
                    mma16<T>(scores[m][n], top[r], bottom[r], top[r + 1], bottom[r + 1], keys[r],
                             keys[r + 1]);
                }
            }
        }
    }
}

// Writes 8 R columns of the result from c on.
template <class T, int M, int R, bool EXACT>
__device__ inline void mix(const Shares<M>& shares, const Rows<T>& v, const Rows<T>& out, int c) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    c += 2 * R * t;
    uint32_t values[2 * M][R];  // keys g, g + 8, ...
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) {
        v.template read<R, EXACT>(g + 8 * i, c, values[i]);
    }
    float sums[R][M][4] = {};
#pragma unroll
    for (int r = 0; r < R; ++r) {
        uint32_t column[2 * M];
#pragma unroll
        for (int i = 0; i < 2 * M; ++i) {
            column[i] = values[i][r];
        }
        add_shared<T, M>(sums[r], shares, column);
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float found[2 * R];
#pragma unroll
            for (int i = 0; i < 2 * R; ++i) {
                found[i] = sums[i / 2][m][2 * half + i % 2];
            }
            out.template write<R, EXACT>(16 * m + 8 * half + g, c, found);
        }
    }
}

// T: a 16-bit type. M: 1 to 16 frames, 2 to 32. D: the head dim where 16 bytes are aligned
// everywhere and D is a multiple of 8; else 0, and `dense` says whether they are. Left to itself
// ptxas 13.0 spills 8 to 16 bytes of some, to have one block more; 64 and 128 registers do.
template <class T, int M, int D>
__global__ void __launch_bounds__(THREADS, M == 1 && D > 0 ? 4 : 2)
    attend_kernel(const __grid_constant__ TemporalAttention p, bool dense) {
    const uint32_t index = blockIdx.x * WARPS + threadIdx.x / 32;
    if (index >= p.items) {
        return;
    }
    const Item item = item_of(p, index);
    const Rows<T> q = rows_of<T>(p, p.Q, item, dense), k = rows_of<T>(p, p.K, item, dense);
    const Rows<T> v = rows_of<T>(p, p.V, item, dense), out = rows_of<T>(p, p.OUT, item, dense);
    constexpr bool EXACT = D > 0;
    constexpr int REST = D % 32;
    static_assert(REST == 0 || REST == 8 || REST == 16);
    const int whole = EXACT ? D - REST : p.head_dim;

    Scores<M> scores = {};
#pragma unroll(EXACT ? D / 32 + 1 : 1)
    for (int c = 0; c < whole; c += 32) {
        add_scores<T, M, 4, EXACT>(scores, q, k, c);
    }
    if constexpr (REST > 0) {
        add_scores<T, M, REST / 8, EXACT>(scores, q, k, whole);
    }
    Shares<M> shares;
    softmax<T, M>(scores, p.frames, p.scale * LOG2_E, shares);
#pragma unroll(EXACT ? D / 32 + 1 : 1)
    for (int c = 0; c < whole; c += 32) {
        mix<T, M, 4, EXACT>(shares, v, out, c);
    }
    if constexpr (REST > 0) {
        mix<T, M, REST / 8, EXACT>(shares, v, out, whole);
    }
}

// float32, IEEE products: a warp's own shared memory, a chunk of the head dim at a time.
constexpr int CHUNK = 40;       // divides the head dims of SD-1.x
constexpr int ROW = CHUNK + 4;  // 8 rows of 16 bytes then lie in different banks
constexpr int WIDE_WARPS = 4;   // 45 KB of shared memory

struct Wide {
    float left[MOST_FRAMES][ROW], right[MOST_FRAMES][ROW];  // q or shares, k or v
};

__device__ inline void fill(float (&to)[MOST_FRAMES][ROW], const Rows<float>& x, int c) {
    const int lane = threadIdx.x % 32;
    const int width = min(CHUNK, x.columns - c);
    if (x.dense) {
        for (int i = lane; i < x.frames * (width / 4); i += 32) {
            const int f = i / (width / 4), at = i % (width / 4) * 4;
            *reinterpret_cast<float4*>(&to[f][at]) =
                *reinterpret_cast<const float4*>(x.at + f * x.by_frame + c + at);
        }
        return;
    }
    for (int i = lane; i < x.frames * width; i += 32) {
        const int f = i / width, at = i % width;
        to[f][at] = x.at[f * x.by_frame + (c + at) * x.by_dim];
    }
    // The products take four columns at a time.
    for (int i = lane; i < x.frames * (-width & 3); i += 32) {
        to[i / (-width & 3)][width + i % (-width & 3)] = 0;
    }
}

// Lane 4g + t has rows g + 8i, i < R, and keys t + 4j, j < 2R. `dense` needs a head dim in fours.
template <int R>
__global__ void __launch_bounds__(32 * WIDE_WARPS)
    attend_wide_kernel(const __grid_constant__ TemporalAttention p, bool dense) {
    struct Scratch {
        Wide of[WIDE_WARPS];
    };
    TVK_SHARED(Scratch, scratch);
    const uint32_t index = blockIdx.x * WIDE_WARPS + threadIdx.x / 32;
    if (index >= p.items) {
        return;
    }
    const Item item = item_of(p, index);
    Wide& mine = scratch.of[threadIdx.x / 32];
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const auto q = rows_of<float>(p, p.Q, item, dense), k = rows_of<float>(p, p.K, item, dense);
    const auto v = rows_of<float>(p, p.V, item, dense);
    const auto out = rows_of<float>(p, p.OUT, item, dense);

    float scores[R][2 * R] = {};
    for (int c = 0; c < p.head_dim; c += CHUNK) {
        fill(mine.left, q, c);
        fill(mine.right, k, c);
        __syncwarp();
        const int width = min(CHUNK, p.head_dim - c);
        for (int at = 0; at < width; at += 4) {
            float4 a[R];
#pragma unroll
            for (int i = 0; i < R; ++i) {
                a[i] = *reinterpret_cast<const float4*>(&mine.left[g + 8 * i][at]);
            }
#pragma unroll
            for (int j = 0; j < 2 * R; ++j) {
                const float4 b = *reinterpret_cast<const float4*>(&mine.right[t + 4 * j][at]);
#pragma unroll
                for (int i = 0; i < R; ++i) {
                    scores[i][j] += a[i].x * b.x + a[i].y * b.y + a[i].z * b.z + a[i].w * b.w;
                }
            }
        }
        __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < R; ++i) {
        float top = -INFINITY, total = 0;
#pragma unroll
        for (int j = 0; j < 2 * R; ++j) {
            scores[i][j] = t + 4 * j < p.frames ? scores[i][j] * p.scale : -INFINITY;
            top = fmaxf(top, scores[i][j]);
        }
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
#pragma unroll
        for (int j = 0; j < 2 * R; ++j) {
            // The difference is exact to a rounding step of the score, before it is scaled.
            scores[i][j] = exp2f((scores[i][j] - top) * LOG2_E);
            total += scores[i][j];
        }
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        const float share = __fdividef(1.0f, total);  // total is from 1 to 32
#pragma unroll
        for (int j = 0; j < 2 * R; ++j) {
            mine.left[g + 8 * i][t + 4 * j] = scores[i][j] * share;
        }
    }
    for (int c = 0; c < p.head_dim; c += CHUNK) {
        fill(mine.right, v, c);
        __syncwarp();
        float sums[R][CHUNK / 4] = {};  // columns 2t, 2t + 1 of every eight
        for (int key = 0; key < p.frames; ++key) {
            float value[CHUNK / 4];
#pragma unroll
            for (int j = 0; j < CHUNK / 4; j += 2) {
                const float2 pair =
                    *reinterpret_cast<const float2*>(&mine.right[key][4 * j + 2 * t]);
                value[j] = pair.x;
                value[j + 1] = pair.y;
            }
#pragma unroll
            for (int i = 0; i < R; ++i) {
                const float share = mine.left[g + 8 * i][key];
#pragma unroll
                for (int j = 0; j < CHUNK / 4; ++j) {
                    sums[i][j] += share * value[j];
                }
            }
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < R; ++i) {
            const int f = g + 8 * i;
            if (f >= p.frames) {
                continue;
            }
#pragma unroll
            for (int j = 0; j < CHUNK / 4; j += 2) {
                const int column = c + 4 * j + 2 * t;
                float* to = out.at + f * out.by_frame + column * out.by_dim;
                if (dense && column < p.head_dim) {
                    *reinterpret_cast<float2*>(to) = make_float2(sums[i][j], sums[i][j + 1]);
                    continue;
                }
                if (column < p.head_dim) {
                    to[0] = sums[i][j];
                }
                if (column + 1 < p.head_dim) {
                    to[out.by_dim] = sums[i][j + 1];
                }
            }
        }
    }
}

// Whether rows of one head begin on 16 bytes everywhere, in every operand.
inline bool dense(const TemporalAttention& p, int element_size) {
    const int run = 16 / element_size;
    const int sizes[] = {p.batches, p.frames, p.positions, p.heads};
    bool fits = p.head_dim % run == 0;
    for (int x = 0; x < p.OPERANDS; ++x) {
        fits = fits && aligned(x == p.OUT ? p.out : p.data[x], 16) && p.stride[x][4] == 1;
        for (int d = 0; d < 4; ++d) {
            fits = fits && (sizes[d] == 1 || p.stride[x][d] % run == 0);
        }
    }
    return fits;
}

template <class T, int M>
cudaError_t launch_narrow(const TemporalAttention& p, cudaStream_t stream) {
    const bool runs = dense(p, sizeof(T));
    const int head_dim = runs ? p.head_dim : 0;
    const auto kernel = head_dim == 40    ? attend_kernel<T, M, 40>
                        : head_dim == 80  ? attend_kernel<T, M, 80>
                        : head_dim == 160 ? attend_kernel<T, M, 160>
                                          : attend_kernel<T, M, 0>;
    return launch(kernel, ceil_div(p.items, WARPS), THREADS, stream, p, runs);
}

}  // namespace temporal

// T: storage type of q, k, v and the result. No size is 0.
template <class T>
cudaError_t launch_temporal_attention(TemporalAttention p, cudaStream_t stream) {
    using namespace temporal;
    const int64_t items = static_cast<int64_t>(p.batches) * p.positions * p.heads;
    if (p.frames > MOST_FRAMES || p.head_dim > MOST_HEAD_DIM || items > INT32_MAX) {
        return cudaErrorInvalidValue;
    }
    p.items = static_cast<uint32_t>(items);
    if constexpr (std::is_same_v<T, float>) {
        const auto kernel = p.frames <= 16 ? attend_wide_kernel<2> : attend_wide_kernel<4>;
        const bool runs = dense(p, sizeof(T));
        return launch(kernel, ceil_div(p.items, WIDE_WARPS), 32 * WIDE_WARPS, stream, p, runs);
    } else {
        return p.frames <= 16 ? launch_narrow<T, 1>(p, stream) : launch_narrow<T, 2>(p, stream);
    }
}

}  // namespace tvk
