// The frames of one position, read and written in place: 16 bytes at a time where that is
// possible.
#pragma once

#include <cstdint>

#include "kernels/common/numbers.cuh"

namespace tvk {

// What a tensor holds of one position: [frames, columns].
template <class T>
struct Rows {
    T* at;
    int64_t by_frame, by_dim;
    int frames, columns;
    bool dense;  // 16 bytes can be read and written at a time

    // R registers, 2 R neighbours, of frame f from column c; zero outside.
    template <int R, bool EXACT>
    __device__ void read(int f, int c, uint32_t (&to)[R]) const {
#pragma unroll
        for (int i = 0; i < R; ++i) {
            to[i] = 0;
        }
        const T* from = at + f * by_frame;
        if (f < frames) {
            if (EXACT || (dense && c + 2 * R <= columns)) {
                read_words(from + c, to);
            } else if constexpr (!EXACT) {
#pragma unroll
                for (int i = 0; i < 2 * R; ++i) {
                    if (c + i < columns) {
                        const T x = from[(c + i) * by_dim];
                        to[i / 2] |= uint32_t{reinterpret_cast<const uint16_t&>(x)}
                                     << (i % 2 * 16);
                    }
                }
            }
        }
    }

    // 2 R neighbours of frame f from column c, where there are such.
    template <int R, bool EXACT>
    __device__ void write(int f, int c, const float (&from)[2 * R]) const {
        T* to = at + f * by_frame;
        if (f >= frames) {
            return;
        }
        if (EXACT || (dense && c + 2 * R <= columns)) {
            write_run(from, to + c);
        } else if constexpr (!EXACT) {
#pragma unroll
            for (int i = 0; i < 2 * R; ++i) {
                if (c + i < columns) {
                    from_float(from[i], to[(c + i) * by_dim]);
                }
            }
        }
    }
};

}  // namespace tvk
