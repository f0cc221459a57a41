#include "cpu/kernels/clip_group_norm.h"

#include <type_traits>

#include "cpu/common/vec.h"

namespace tvk::TVK_LEVEL {
namespace {

// Numbers p .. p + n of one channel's plane, in place where they are a dense run.
template <typename T>
const T* positions(const ClipGroupNorm& a, const T* plane, int64_t p, int64_t n, T* buffer) {
    if (a.dense()) {
        return plane + p;
    }
    const int64_t by = a.x.column;
    for (int64_t i = 0; i < n;) {  // row by row
        const int64_t y = (p + i) / a.width, x = (p + i) % a.width;
        const int64_t end = i + a.width - x < n ? i + a.width - x : n;
        for (const T* from = plane + y * a.x.row + x * by; i < end; ++i, from += by) {
            buffer[i] = *from;
        }
    }
    return buffer;
}

struct Moments {
    double count = 0, mean = 0, squares = 0;

    // Chan, Golub and LeVeque's update: no difference of large numbers.
    void add(double n, double other_mean, double other_squares) {
        const double total = count + n, apart = other_mean - mean;
        mean += apart * n / total;
        squares += other_squares + apart * apart * count * n / total;
        count = total;
    }

    // n <= BLOCK numbers: their mean, then the squared differences from it while they are in L1.
    template <typename T>
    void add(const T* p, int64_t n) {
        const int64_t whole = n / W * W;
        f32v sums[4] = {f32v{}, f32v{}, f32v{}, f32v{}};
        int64_t i = 0;
        for (; i + 4 * W <= n; i += 4 * W) {
            for (int u = 0; u < 4; ++u) {
                sums[u] += load(p + i + u * W);
            }
        }
        for (; i < whole; i += W) {
            sums[0] += load(p + i);
        }
        float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
        for (; i < n; ++i) {
            total += widen(p[i]);
        }
        const float middle = total / static_cast<float>(n);
        f32v squares_of[4] = {f32v{}, f32v{}, f32v{}, f32v{}},
             rests[4] = {f32v{}, f32v{}, f32v{}, f32v{}};
        for (i = 0; i + 4 * W <= n; i += 4 * W) {
            for (int u = 0; u < 4; ++u) {
                const f32v d = load(p + i + u * W) - middle;
                squares_of[u] += d * d;
                rests[u] += d;
            }
        }
        for (; i < whole; i += W) {
            const f32v d = load(p + i) - middle;
            squares_of[0] += d * d;
            rests[0] += d;
        }
        float square = sum((squares_of[0] + squares_of[1]) + (squares_of[2] + squares_of[3]));
        float rest = sum((rests[0] + rests[1]) + (rests[2] + rests[3]));
        for (; i < n; ++i) {
            const float d = widen(p[i]) - middle;
            square += d * d;
            rest += d;
        }
        // `middle` is rounded; the mean of the differences puts that right.
        const double off = static_cast<double>(rest) / static_cast<double>(n);
        add(static_cast<double>(n), middle + off, square - off * rest);
    }
};

// The first number of a task's group.
template <typename T>
const T* group_at(const ClipGroupNorm& a, int64_t task) {
    const int64_t group = task % a.groups, frame = task / a.groups;
    return static_cast<const T*>(a.x.data) + frame / a.frames * a.x.batch +
           frame % a.frames * a.x.frame + group * a.group_channels() * a.x.channel;
}

template <typename T>
void moments(const ClipGroupNorm& a, int64_t begin, int64_t end, float* scratch) {
    T* buffer = reinterpret_cast<T*>(scratch);
    // Planes that follow each other are one run.
    const bool whole = a.dense() && a.x.channel == a.plane();
    const int64_t runs = whole ? 1 : a.group_channels();
    const int64_t length = whole ? a.group_channels() * a.plane() : a.plane();
    for (int64_t task = begin; task < end; ++task) {
        const T* group = group_at<T>(a, task);
        Moments found;
        for (int64_t p = 0; p < length; p += a.BLOCK) {
            const int64_t left = length - p, n = left < a.BLOCK ? left : a.BLOCK;
            for (int64_t run = 0; run < runs; ++run) {
                found.add(positions(a, group + run * a.x.channel, p, n, buffer), n);
            }
        }
        a.moments[2 * task] = found.mean;
        a.moments[2 * task + 1] = found.squares;
    }
}

template <typename T, bool SILU>
void finish(const T* from, int64_t n, float mean, float scale, float bias, T* to) {
    const auto value = [&](f32v x) {
        const f32v y = (x - mean) * scale + bias;
        return SILU ? y / (exp(-y) + 1.0f) : y;
    };
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        store(value(load(from + i)), to + i);
    }
    if (i < n) {
        const int rest = static_cast<int>(n - i);
        store(value(load(from + i, rest)), to + i, rest);
    }
}

template <typename T, bool SILU>
void apply(const ClipGroupNorm& a, int64_t begin, int64_t end, float* scratch) {
    T* buffer = reinterpret_cast<T*>(scratch);
    const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
    const int64_t inside = a.group_channels(), plane = a.plane();
    for (int64_t task = begin; task < end; ++task) {
        const T* group = group_at<T>(a, task);
        const int64_t first = task % a.groups * inside;
        const int64_t statistic = task / a.groups / a.frames * a.groups + task % a.groups;
        T* out = static_cast<T*>(a.out) + task * inside * plane;
        for (int64_t p = 0; p < plane; p += a.BLOCK) {
            const int64_t left = plane - p, n = left < a.BLOCK ? left : a.BLOCK;
            for (int64_t c = 0; c < inside; ++c) {
                const T* from = positions(a, group + c * a.x.channel, p, n, buffer);
                const float scale = a.rstd[statistic] * widen(weight[first + c]);
                finish<T, SILU>(from, n, a.mean[statistic], scale, widen(bias[first + c]),
                                out + c * plane + p);
            }
        }
    }
}

}  // namespace

void clip_group_norm_moments(const ClipGroupNorm& a, int64_t begin, int64_t end, float* scratch) {
    switch_dtype(a.dtype, [&](auto* p) {
        moments<std::remove_pointer_t<decltype(p)>>(a, begin, end, scratch);
    });
}

void clip_group_norm_apply(const ClipGroupNorm& a, int64_t begin, int64_t end, float* scratch) {
    switch_dtype(a.dtype, [&](auto* p) {
        using T = std::remove_pointer_t<decltype(p)>;
        a.silu ? apply<T, true>(a, begin, end, scratch) : apply<T, false>(a, begin, end, scratch);
    });
}

}  // namespace tvk::TVK_LEVEL
