// Loops over tensors of one shape and any strides. Knows no torch.
#pragma once

#include <cstdint>

namespace tvk {

// The shape that several operands share, with neighbouring dimensions merged where every operand
// steps through both as through one. The last dimension is the inner one.
template <int OPERANDS>
struct Strided {
    static constexpr int MAX_DIMS = 8;

    int dims = 0;
    int64_t size[MAX_DIMS];
    int64_t stride[OPERANDS][MAX_DIMS];  // in elements

    // Appends an inner dimension; false where there are too many of them to hold.
    bool push(int64_t length, const int64_t (&step)[OPERANDS]) {
        if (length == 1) {
            return true;
        }
        bool merges = dims > 0;
        for (int i = 0; merges && i < OPERANDS; ++i) {
            merges = stride[i][dims - 1] == length * step[i];
        }
        if (!merges && dims == MAX_DIMS) {
            return false;
        }
        const int at = merges ? dims - 1 : dims++;
        size[at] = merges ? size[at] * length : length;
        for (int i = 0; i < OPERANDS; ++i) {
            stride[i][at] = step[i];
        }
        return true;
    }

    int64_t inner() const { return dims ? size[dims - 1] : 1; }
    int64_t inner_stride(int operand) const { return dims ? stride[operand][dims - 1] : 1; }

    int64_t rows() const {
        int64_t count = 1;
        for (int i = 0; i + 1 < dims; ++i) {
            count *= size[i];
        }
        return count;
    }

    // Where each operand's row begins, in elements from its first.
    void offsets(int64_t row, int64_t (&found)[OPERANDS]) const {
        for (int i = 0; i < OPERANDS; ++i) {
            found[i] = 0;
        }
        for (int d = dims - 2; d >= 0; --d) {
            const int64_t at = row % size[d];
            row /= size[d];
            for (int i = 0; i < OPERANDS; ++i) {
                found[i] += at * stride[i][d];
            }
        }
    }
};

}  // namespace tvk
