#pragma once

#include <cstdint>

#include "cpu/common/dtype.h"
#include "cpu/common/level.h"

namespace tvk {

struct ClipGroupNorm {
    static constexpr int64_t BLOCK = 4096;  // numbers summed in float32 before they meet others

    DType dtype;
    int64_t batch, frames, channels, height, width, groups;
    struct {
        const void* data;
        int64_t batch, frame, channel, row, column;  // strides in elements
    } x;
    const void *weight, *bias;  // [channels], contiguous
    void* out;                  // contiguous
    bool silu;

    double* moments;           // [batch, frames, groups, 2]: mean, sum of squared differences
    const float *mean, *rstd;  // [batch, groups]

    int64_t plane() const { return height * width; }
    int64_t group_channels() const { return channels / groups; }
    int64_t tasks() const { return batch * frames * groups; }
    // Numbers of one channel are a dense run.
    bool dense() const { return x.column == 1 && (x.row == width || height == 1); }
};

// Tasks [begin, end) of tasks(), one group of one frame each; the scratch has BLOCK floats. First
// the moments, then, with mean and rstd, the results.
TVK_KERNEL(clip_group_norm_moments,
           (const ClipGroupNorm& a, int64_t begin, int64_t end, float* scratch));
TVK_KERNEL(clip_group_norm_apply,
           (const ClipGroupNorm& a, int64_t begin, int64_t end, float* scratch));

}  // namespace tvk
