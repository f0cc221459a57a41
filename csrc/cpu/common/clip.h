// A clip's memory. Knows no torch.
#pragma once

#include <cstdint>

namespace tvk {

// [B, F, C, h, w], strides in elements.
struct Clip {
    const void* data;
    int64_t batch, frame, channel, row, column;
};

}  // namespace tvk
