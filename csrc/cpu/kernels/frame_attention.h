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
    // The coarse level of a segment, -1 for the tokens themselves; what a frame has at that level.
    int slot(const int32_t* segment) const {
        return segment[1] == 0 ? -1 : segment[1] == coarse[0].level ? 0 : 1;
    }
    int64_t cells(int slot) const { return slot < 0 ? tokens : coarse[slot].cells; }
    // Floats of one thread: queries, results, weights, maxima and sums, a tile's keys and values.
    int64_t scratch() const { return block * (2 * dim + 2) + TILE * LANES + 2 * TILE * dim; }
};

// The gradients, of `out` and of `lse` to those of q, k and v. A task has a head of one batch
// entry and a part of the query frames: whole rows of weights and slopes for some queries at a
// time, which costs five products, and sums of its own for dk and dv, so that the number of
// threads changes no bit.
struct FrameAttentionBackward : FrameAttention {
    static constexpr int64_t TASKS = 16;      // at least, where there are frames enough
    static constexpr int64_t STEP = 16;       // of the queries at a time: whole vectors
    static constexpr int64_t NEAR = 1 << 20;  // bytes of weights and slopes that stay near

    const void* grad;
    const float* grad_lse;  // or null
    Axes grad_by, grad_lse_by;
    void *dk, *dv;    // contiguous, like `out`, which is dq
    float* sums;      // zeros: [parts, batch, heads, 2 (dk, dv), rows(), wide]
    int64_t parts;    // of the query frames
    int64_t wide;     // columns of a row of sums: `dim`, rounded up to whole vectors
    int64_t longest;  // keys that one query frame reads, at most

    // Rows of all frames and levels, and the first of one frame at one level.
    int64_t rows() const { return frames * (tokens + coarse[0].cells + coarse[1].cells); }
    int64_t row(int slot, int64_t frame) const {
        const int64_t before = slot < 0 ? 0 : slot == 0 ? tokens : tokens + coarse[0].cells;
        return frames * before + frame * cells(slot);
    }
    int64_t parted() const { return parts * batch * heads; }
    // Queries at a time.
    int64_t lanes() const {
        int64_t found = LANES;
        while (found > STEP && 8 * found * longest > NEAR) {
            found -= STEP;
        }
        return found;
    }
    // Floats of one thread: keys, values and their sums, biases, weights and slopes; queries,
    // gradients and dq in lanes, the first two in rows also; rows to transpose.
    int64_t scratch() const {
        return (longest + 8) * (2 * dim + 2 * wide + 1 + 2 * lanes()) +
               lanes() * (3 * dim + 2 * wide) + 4 * dim;
    }
};

// Tasks [begin, end) of a.tasks(): one block of queries of one frame and head each.
TVK_KERNEL(frame_attention, (const FrameAttention& a, float* scratch, int64_t begin, int64_t end));

// Averages of rows [begin, end) of batch x frames x (rows of cells) of one coarse level.
TVK_KERNEL(frame_attention_pool, (const FrameAttention& a, int slot, int64_t begin, int64_t end));

// Tasks [begin, end) of a.parted(): dq, and the sums.
TVK_KERNEL(frame_attention_backward,
           (const FrameAttentionBackward& a, float* scratch, int64_t begin, int64_t end));

// Tokens [begin, end) of batch x frames x tokens: dk and dv from the sums of every part and level.
// The scratch has wide floats.
TVK_KERNEL(frame_attention_collect,
           (const FrameAttentionBackward& a, float* scratch, int64_t begin, int64_t end));

}  // namespace tvk
