#pragma once

#include <cstdint>

#include "cpu/common/dtype.h"
#include "cpu/common/level.h"

namespace tvk {

struct TemporalAttention {
    // [batch, frames, tokens, heads, dim] with its strides, in elements.
    struct View {
        const void* data;
        int64_t batch, frame, token, head, dim;
    };

    DType dtype;
    int64_t batch, frames, tokens, heads, dim;
    View q, k, v;
    void* out;  // contiguous
    float scale;
    int64_t group;  // heads that are read at once

    int64_t groups() const { return (heads + group - 1) / group; }
    int64_t tasks() const { return batch * tokens * groups(); }
    int64_t scratch_floats() const;  // of one thread
};

// Tasks [begin, end) of tasks(): a group of heads at one token position. The scratch is 64-byte
// aligned and need not be initialised.
TVK_KERNEL(temporal_attention,
           (const TemporalAttention& a, int64_t begin, int64_t end, float* scratch));

// The gradients of `out`, given as `grad`, to q (in `out`), k and v.
struct TemporalAttentionBackward : TemporalAttention {
    View grad;
    void *dk, *dv;  // contiguous

    int64_t scratch_floats() const;
};

// As above.
TVK_KERNEL(temporal_attention_backward,
           (const TemporalAttentionBackward& a, int64_t begin, int64_t end, float* scratch));

namespace temporal {

constexpr int64_t MAX_WIDTH = 16;  // floats in the widest level's vector

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Floats from one staged frame to the next: room for a vector that starts at the last number.
inline int64_t row_floats(const TemporalAttention& a) {
    return padded(a.group * a.dim + MAX_WIDTH, MAX_WIDTH);
}

}  // namespace temporal

inline int64_t TemporalAttention::scratch_floats() const {
    using temporal::padded;
    const int64_t staged = 3 * padded(frames, 4) * temporal::row_floats(*this);
    return staged + (padded(dim, 4) + frames) * temporal::MAX_WIDTH;
}

inline int64_t TemporalAttentionBackward::scratch_floats() const {
    using temporal::padded;
    const int64_t staged = 4 * padded(frames, 4) * temporal::row_floats(*this);
    const int64_t square = frames * padded(frames, temporal::MAX_WIDTH);
    return staged + padded(dim, 4) * temporal::MAX_WIDTH + 2 * square;
}

}  // namespace tvk
