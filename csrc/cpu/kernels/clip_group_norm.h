#pragma once

#include <cstdint>

#include "cpu/common/clip.h"
#include "cpu/common/dtype.h"
#include "cpu/common/level.h"

namespace tvk {

struct ClipGroupNorm {
    static constexpr int64_t BLOCK = 4096;  // numbers summed in float32 before they meet others

    DType dtype;
    int64_t batch, frames, channels, height, width, groups;
    Clip x, grad;               // grad: of the result, for the gradients alone
    const void *weight, *bias;  // [channels], contiguous
    void* out;                  // contiguous; x's gradient where that is asked for
    bool silu;

    double* moments;           // [batch, frames, groups, 2]: mean, sum of squared differences
    const float *mean, *rstd;  // [batch, groups]
    double* sums;              // [batch, frames, channels, 2]: of what reaches the affine map's
                               // result, alone and times the normalised x
    float* lost;               // [batch, groups, 2]: the part of that which x's gradient loses, as
                               // a constant and a slope over the normalised x
    void *dweight, *dbias;     // [channels], contiguous

    int64_t plane() const { return height * width; }
    int64_t group_channels() const { return channels / groups; }
    int64_t tasks() const { return batch * frames * groups; }
    // Numbers of one channel are a dense run.
    bool dense(const Clip& clip) const {
        return clip.column == 1 && (clip.row == width || height == 1);
    }
};

// Tasks [begin, end) of tasks(), one group of one frame each; the scratch has 2 * BLOCK floats.
// First the moments, then, with mean and rstd, the results; or the sums, their merge (whose tasks
// are the groups, without a scratch) and x's gradient.
TVK_KERNEL(clip_group_norm_moments,
           (const ClipGroupNorm& a, int64_t begin, int64_t end, float* scratch));
TVK_KERNEL(clip_group_norm_apply,
           (const ClipGroupNorm& a, int64_t begin, int64_t end, float* scratch));
TVK_KERNEL(clip_group_norm_sums,
           (const ClipGroupNorm& a, int64_t begin, int64_t end, float* scratch));
TVK_KERNEL(clip_group_norm_merge,
           (const ClipGroupNorm& a, int64_t begin, int64_t end, float* scratch));
TVK_KERNEL(clip_group_norm_differentiate,
           (const ClipGroupNorm& a, int64_t begin, int64_t end, float* scratch));

}  // namespace tvk
