#pragma once

#include <cstdint>

#include "cpu/common/clip.h"
#include "cpu/common/dtype.h"
#include "cpu/common/level.h"

namespace tvk {

// A group norm of every position for itself, over a group's channels and the frames, and SiLU.
struct TemporalGroupNorm {
    static constexpr int64_t BLOCK = 64;  // positions of a task

    DType dtype;
    int64_t batch, frames, channels, height, width, groups;
    Clip x, grad;               // grad: of the result, for the gradients alone
    const void *weight, *bias;  // [channels], contiguous
    float eps;
    void* out;              // contiguous; x's gradient where that is asked for
    double* sums;           // [tasks, group_channels, 2]: of what reaches the affine map's result,
                            // times the normalised x and alone
    void *dweight, *dbias;  // [channels], contiguous

    int64_t plane() const { return height * width; }
    int64_t group_channels() const { return channels / groups; }
    int64_t blocks() const { return (plane() + BLOCK - 1) / BLOCK; }
    int64_t tasks() const { return batch * groups * blocks(); }
    // Numbers that a task holds of a clip.
    int64_t held() const { return frames * group_channels() * BLOCK; }
};

// Tasks [begin, end) of tasks(), a block of positions of one group each. The results take held()
// floats of scratch, the gradients twice as many; after these, the merge of the groups [begin,
// end) gives those of weight and bias.
TVK_KERNEL(temporal_group_norm,
           (const TemporalGroupNorm& a, int64_t begin, int64_t end, float* scratch));
TVK_KERNEL(temporal_group_norm_differentiate,
           (const TemporalGroupNorm& a, int64_t begin, int64_t end, float* scratch));
TVK_KERNEL(temporal_group_norm_merge, (const TemporalGroupNorm& a, int64_t begin, int64_t end));

}  // namespace tvk
