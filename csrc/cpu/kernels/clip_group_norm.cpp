#include "cpu/kernels/clip_group_norm.h"

#include <type_traits>

#include "cpu/common/vec.h"

namespace tvk::TVK_LEVEL {
namespace {

// Numbers p .. p + n of one channel's plane, in place where they are a dense run.
template <typename T>
const T* positions(const ClipGroupNorm& a, const Clip& clip, const T* plane, int64_t p, int64_t n,
                   T* buffer) {
    if (a.dense(clip)) {
        return plane + p;
    }
    const int64_t by = clip.column;
    for (int64_t i = 0; i < n;) {  // row by row
        const int64_t y = (p + i) / a.width, x = (p + i) % a.width;
        const int64_t end = i + a.width - x < n ? i + a.width - x : n;
        for (const T* from = plane + y * clip.row + x * by; i < end; ++i, from += by) {
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
const T* group_at(const ClipGroupNorm& a, const Clip& clip, int64_t task) {
    const int64_t group = task % a.groups, frame = task / a.groups;
    return static_cast<const T*>(clip.data) + frame / a.frames * clip.batch +
           frame % a.frames * clip.frame + group * a.group_channels() * clip.channel;
}

template <typename T>
void moments(const ClipGroupNorm& a, int64_t begin, int64_t end, float* scratch) {
    T* buffer = reinterpret_cast<T*>(scratch);
    // Planes that follow each other are one run.
    const bool whole = a.dense(a.x) && a.x.channel == a.plane();
    const int64_t runs = whole ? 1 : a.group_channels();
    const int64_t length = whole ? a.group_channels() * a.plane() : a.plane();
    for (int64_t task = begin; task < end; ++task) {
        const T* group = group_at<T>(a, a.x, task);
        Moments found;
        for (int64_t p = 0; p < length; p += a.BLOCK) {
            const int64_t left = length - p, n = left < a.BLOCK ? left : a.BLOCK;
            for (int64_t run = 0; run < runs; ++run) {
                found.add(positions(a, a.x, group + run * a.x.channel, p, n, buffer), n);
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
    each_vector(n,
                [&](int64_t i, auto some) { store(value(load(from + i, some)), to + i, some); });
}

template <typename T, bool SILU>
void apply(const ClipGroupNorm& a, int64_t begin, int64_t end, float* scratch) {
    T* buffer = reinterpret_cast<T*>(scratch);
    const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
    const int64_t inside = a.group_channels(), plane = a.plane();
    for (int64_t task = begin; task < end; ++task) {
        const T* group = group_at<T>(a, a.x, task);
        const int64_t first = task % a.groups * inside;
        const int64_t statistic = task / a.groups / a.frames * a.groups + task % a.groups;
        T* out = static_cast<T*>(a.out) + task * inside * plane;
        for (int64_t p = 0; p < plane; p += a.BLOCK) {
            const int64_t left = plane - p, n = left < a.BLOCK ? left : a.BLOCK;
            for (int64_t c = 0; c < inside; ++c) {
                const T* from = positions(a, a.x, group + c * a.x.channel, p, n, buffer);
                const float scale = a.rstd[statistic] * widen(weight[first + c]);
                finish<T, SILU>(from, n, a.mean[statistic], scale, widen(bias[first + c]),
                                out + c * plane + p);
            }
        }
    }
}

// What one channel's gradients are made of.
template <typename T, bool SILU>
struct Channel {
    float mean, rstd, weight, bias;

    Channel(const ClipGroupNorm& a, int64_t statistic, int64_t c)
        : mean(a.mean[statistic]),
          rstd(a.rstd[statistic]),
          weight(widen(static_cast<const T*>(a.weight)[c])),
          bias(widen(static_cast<const T*>(a.bias)[c])) {}

    f32v normalised(f32v x) const { return (x - mean) * rstd; }

    // The gradient that reaches the affine map's result.
    f32v outer(f32v normal, f32v grad) const {
        if (!SILU) {
            return grad;
        }
        const f32v y = normal * weight + bias, sigmoid = 1.0f / (exp(-y) + 1.0f);
        return grad * sigmoid * (y * (1.0f - sigmoid) + 1.0f);
    }
};

// Calls visit(task, statistic, channel of the group, first position, x, grad, n) for every block
// of the tasks' channels.
template <typename T, typename Visit>
void each_block(const ClipGroupNorm& a, int64_t begin, int64_t end, float* scratch, Visit visit) {
    T* buffer = reinterpret_cast<T*>(scratch);
    T* other = reinterpret_cast<T*>(scratch + a.BLOCK);
    for (int64_t task = begin; task < end; ++task) {
        const T *x = group_at<T>(a, a.x, task), *grad = group_at<T>(a, a.grad, task);
        const int64_t statistic = task / a.groups / a.frames * a.groups + task % a.groups;
        for (int64_t c = 0; c < a.group_channels(); ++c) {
            for (int64_t p = 0; p < a.plane(); p += a.BLOCK) {
                const int64_t left = a.plane() - p, n = left < a.BLOCK ? left : a.BLOCK;
                visit(task, statistic, c, p, positions(a, a.x, x + c * a.x.channel, p, n, buffer),
                      positions(a, a.grad, grad + c * a.grad.channel, p, n, other), n);
            }
        }
    }
}

template <typename T, bool SILU>
void sums(const ClipGroupNorm& a, int64_t begin, int64_t end, float* scratch) {
    const auto visit = [&](int64_t task, int64_t statistic, int64_t c, int64_t p, const T* x,
                           const T* grad, int64_t n) {
        const Channel<T, SILU> channel(a, statistic, task % a.groups * a.group_channels() + c);
        f32v totals[4] = {f32v{}, f32v{}, f32v{}, f32v{}},
             products[4] = {f32v{}, f32v{}, f32v{}, f32v{}};
        const auto add = [&](int64_t i, int u, auto some) {
            // Zeros beyond the last number add nothing, where the mean's opposite can overflow.
            const f32v normal = first(channel.normalised(load(x + i, some)), some);
            const f32v outer = channel.outer(normal, load(grad + i, some));
            totals[u] += outer;
            products[u] += outer * normal;
        };
        int64_t i = 0;
        for (; i + 4 * W <= n; i += 4 * W) {
            for (int u = 0; u < 4; ++u) {
                add(i + u * W, u, Whole());
            }
        }
        each_vector(n - i, [&](int64_t rest, auto some) { add(i + rest, 0, some); });
        double* found = a.sums + 2 * (task * a.group_channels() + c);
        found[0] = (p ? found[0] : 0) + sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
        found[1] =
            (p ? found[1] : 0) + sum((products[0] + products[1]) + (products[2] + products[3]));
    };
    each_block<T>(a, begin, end, scratch, visit);
}

// The frames' sums together: gradients of weight and bias, and what x's gradient loses.
template <typename T>
void merge(const ClipGroupNorm& a, int64_t begin, int64_t end) {
    const T* weight = static_cast<const T*>(a.weight);
    const int64_t inside = a.group_channels();
    const double count = static_cast<double>(a.frames * inside * a.plane());
    for (int64_t b = 0; b < a.batch; ++b) {
        for (int64_t i = 2 * begin; i < 2 * end; ++i) {
            a.lost[2 * b * a.groups + i] = 0;
        }
    }
    for (int64_t c = begin * inside; c < end * inside; ++c) {
        double total[2] = {0, 0};
        for (int64_t b = 0; b < a.batch; ++b) {
            for (int64_t i = 0; i < 2; ++i) {
                double of_clip = 0;
                for (int64_t f = 0; f < a.frames; ++f) {
                    of_clip += a.sums[2 * ((b * a.frames + f) * a.channels + c) + i];
                }
                total[i] += of_clip;
                a.lost[2 * (b * a.groups + c / inside) + i] +=
                    static_cast<float>(of_clip / count * widen(weight[c]));
            }
        }
        narrow(static_cast<float>(total[0]), static_cast<T*>(a.dbias) + c);
        narrow(static_cast<float>(total[1]), static_cast<T*>(a.dweight) + c);
    }
}

template <typename T, bool SILU>
void differentiate(const ClipGroupNorm& a, int64_t begin, int64_t end, float* scratch) {
    const auto visit = [&](int64_t task, int64_t statistic, int64_t c, int64_t p, const T* x,
                           const T* grad, int64_t n) {
        const Channel<T, SILU> channel(a, statistic, task % a.groups * a.group_channels() + c);
        const float constant = a.lost[2 * statistic], slope = a.lost[2 * statistic + 1];
        const auto found = [&](f32v value, f32v outer) {
            const f32v normal = channel.normalised(value);
            outer = channel.outer(normal, outer) * channel.weight;
            return (outer - constant - normal * slope) * channel.rstd;
        };
        T* to = static_cast<T*>(a.out) + (task * a.group_channels() + c) * a.plane() + p;
        each_vector(n, [&](int64_t i, auto some) {
            store(found(load(x + i, some), load(grad + i, some)), to + i, some);
        });
    };
    each_block<T>(a, begin, end, scratch, visit);
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

void clip_group_norm_sums(const ClipGroupNorm& a, int64_t begin, int64_t end, float* scratch) {
    switch_dtype(a.dtype, [&](auto* p) {
        using T = std::remove_pointer_t<decltype(p)>;
        a.silu ? sums<T, true>(a, begin, end, scratch) : sums<T, false>(a, begin, end, scratch);
    });
}

void clip_group_norm_merge(const ClipGroupNorm& a, int64_t begin, int64_t end, float*) {
    switch_dtype(a.dtype,
                 [&](auto* p) { merge<std::remove_pointer_t<decltype(p)>>(a, begin, end); });
}

void clip_group_norm_differentiate(const ClipGroupNorm& a, int64_t begin, int64_t end,
                                   float* scratch) {
    switch_dtype(a.dtype, [&](auto* p) {
        using T = std::remove_pointer_t<decltype(p)>;
        a.silu ? differentiate<T, true>(a, begin, end, scratch)
               : differentiate<T, false>(a, begin, end, scratch);
    });
}

}  // namespace tvk::TVK_LEVEL
