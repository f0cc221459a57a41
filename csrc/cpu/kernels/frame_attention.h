#pragma once

#include <cstdint>

#include "cpu/common/dtype.h"
#include "cpu/common/level.h"

namespace tvk {

// Strides of a [B, F, N, H, D] tensor, in elements.
struct Axes {
    int64_t b, f, n, h, d;
};

struct FrameAttention {
    static constexpr int MAX_LEVELS = 2;
    static constexpr int64_t TILE = 128;   // keys at a time
    static constexpr int64_t LANES = 64;   // queries of the widest group
    static constexpr int64_t BLOCK = 256;  // queries that share the tiles they read, at most

    // Averages of every frame's tokens over level x level cells: float, [B, F, H, cells, D].
    struct Coarse {
        int64_t level;  // 0: unused
        int64_t cells;
        float* k;
        float* v;
        const float* size_bias;  // [cells], log of the tokens in each
    };

    DType dtype;
    const void* q;
    const void* k;
    const void* v;
    void* out;   // contiguous
    float* lse;  // contiguous, or null
    Axes q_by, k_by, v_by;
    int64_t batch, frames_q, frames, tokens, heads, dim, h, w;
    const int32_t* row_ptr;   // [frames_q + 1]
    const int32_t* segments;  // [S, 4]: frame, level, count, whether sizes weigh
    const uint8_t* wanted;    // [2, frames]: whether a frame's averages at each level are read
    Coarse coarse[MAX_LEVELS];
    float scale;    // of the scores
    int64_t block;  // queries that share the tiles they read, a multiple of 16

    int64_t blocks() const { return (tokens + block - 1) / block; }
    int64_t tasks() const { return batch * heads * frames_q * blocks(); }
    // Floats of one thread: queries, results, weights, maxima and sums, a tile's keys and values.
    int64_t scratch() const { return block * (2 * dim + 2) + TILE * LANES + 2 * TILE * dim; }
};

// Tasks [begin, end) of a.tasks(): one block of queries of one frame and head each.
TVK_KERNEL(frame_attention, (const FrameAttention& a, float* scratch, int64_t begin, int64_t end));

// Averages of rows [begin, end) of batch x frames x (rows of cells) of one coarse level.
TVK_KERNEL(frame_attention_pool, (const FrameAttention& a, int slot, int64_t begin, int64_t end));

}  // namespace tvk
