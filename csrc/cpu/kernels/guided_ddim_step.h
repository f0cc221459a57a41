#pragma once

#include <cstdint>

#include "common/strided.h"
#include "cpu/common/dtype.h"
#include "cpu/common/level.h"

namespace tvk {

enum class MaskType { none, same, f32, boolean };

struct GuidedStep {
    enum { OUT, SAMPLE, NOISE, MASK, BACKGROUND, OPERANDS };

    static constexpr int64_t BLOCK = 1024;  // elements at a time; strided ones are gathered in L1

    Strided<OPERANDS> over;
    DType dtype;
    MaskType mask_type;
    void* out;  // contiguous
    const void* sample;
    const void* noise;        // the unconditional half under guidance
    const void* conditional;  // null without guidance
    const void* mask;
    const void* background;
    float keep, add, guidance;  // result = keep * sample + add * eps

    int64_t blocks_per_row() const { return (over.inner() + BLOCK - 1) / BLOCK; }
};

// Blocks [begin, end) of over.rows() * blocks_per_row().
TVK_KERNEL(guided_ddim_step, (const GuidedStep& a, int64_t begin, int64_t end));

}  // namespace tvk
