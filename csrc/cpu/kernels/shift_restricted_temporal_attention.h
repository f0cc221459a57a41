#pragma once

#include <cstdint>

#include "cpu/common/dtype.h"
#include "cpu/common/level.h"

namespace tvk {

// What surrounds the attention of some positions of one clip: the centering before it, the bias
// and z after it.
struct Stam {
    DType dtype;
    const void* z;  // [frames, tokens, channels], strides in elements
    int64_t z_f, z_n, z_c;
    int64_t frames, tokens, channels;
    void* rows;        // [frames, tokens, channels], dense
    const void* bias;  // [channels], dense, or null
    void* out;         // frames are out_f elements apart, what lies in them is dense
    int64_t out_f;
};

// rows = z - its mean over frames, for tokens [begin, end).
TVK_KERNEL(stam_center, (const Stam& a, int64_t begin, int64_t end));

// out = z + (rows + bias), for tokens [begin, end).
TVK_KERNEL(stam_add, (const Stam& a, int64_t begin, int64_t end));

}  // namespace tvk
