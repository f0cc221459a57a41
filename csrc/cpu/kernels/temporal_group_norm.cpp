#include "cpu/kernels/temporal_group_norm.h"

#include <type_traits>

#include "cpu/common/vec.h"

namespace tvk::TVK_LEVEL {
namespace {

constexpr int64_t BLOCK = TemporalGroupNorm::BLOCK, VECTORS = BLOCK / W;

// A block's positions in vectors; those beyond the plane are zero. All of them are worked on:
// loops of a known length stay in registers.
struct Positions {
    f32v of[VECTORS] = {};
};

// One task: where its block lies.
struct Task {
    int64_t batch, group, first, count;

    Task(const TemporalGroupNorm& a, int64_t task) {
        const int64_t left = a.plane() - task % a.blocks() * BLOCK;
        batch = task / a.blocks() / a.groups, group = task / a.blocks() % a.groups;
        first = task % a.blocks() * BLOCK, count = left < BLOCK ? left : BLOCK;
    }

    // Vectors that hold some of them.
    int64_t vectors() const { return (count + W - 1) / W; }
};

// The clip's numbers of a task, [frames, group_channels, BLOCK] in float.
template <typename T>
void gather(const TemporalGroupNorm& a, const Clip& clip, const Task& task, float* to) {
    const bool dense = clip.column == 1 && (clip.row == a.width || a.height == 1);
    const T* start = static_cast<const T*>(clip.data) + task.batch * clip.batch +
                     task.group * a.group_channels() * clip.channel;
    for (int64_t f = 0; f < a.frames; ++f) {
        for (int64_t c = 0; c < a.group_channels(); ++c, to += BLOCK) {
            const T* plane = start + f * clip.frame + c * clip.channel;
            if (dense) {
                const T* from = plane + task.first;
                each_vector(task.count,
                            [&](int64_t i, auto n) { store(load(from + i, n), to + i); });
                for (int64_t i = task.vectors() * W; i < BLOCK; i += W) {
                    store(f32v{}, to + i);
                }
                continue;
            }
            for (int64_t i = 0; i < BLOCK; ++i) {
                const int64_t p = task.first + i;
                to[i] = i < task.count
                            ? widen(plane[p / a.width * clip.row + p % a.width * clip.column])
                            : 0.0f;
            }
        }
    }
}

// Sums over a task's numbers of each position: of a frame's channels, then of the frames.
template <typename Value>
Positions sum_over(const TemporalGroupNorm& a, Value value) {
    Positions total;
    for (int64_t f = 0; f < a.frames; ++f) {
        Positions frame;
        for (int64_t row = f * a.group_channels(); row < (f + 1) * a.group_channels(); ++row) {
            for (int64_t v = 0; v < VECTORS; ++v) {
                frame.of[v] += value(row * BLOCK + v * W, v);
            }
        }
        for (int64_t v = 0; v < VECTORS; ++v) {
            total.of[v] += frame.of[v];
        }
    }
    return total;
}

f32v rsqrt(f32v x) {
    float each[W];
    store(x, each);
    for (float& one : each) {
        one = 1.0f / __builtin_sqrtf(one);
    }
    return load(each);
}

// Takes the mean from x and divides it by the spread, in place; returns 1 / spread.
Positions normalise(const TemporalGroupNorm& a, const Task& task, float* x) {
    const float count = static_cast<float>(a.frames * a.group_channels());
    const int64_t rows = a.frames * a.group_channels();
    Positions mean = sum_over(a, [&](int64_t at, int64_t) { return load(x + at); });
    for (f32v& of : mean.of) {
        of /= count;
    }
    const Positions squares = sum_over(a, [&](int64_t at, int64_t v) {
        const f32v centred = load(x + at) - mean.of[v];
        store(centred, x + at);
        return centred * centred;
    });
    Positions rstd;  // zero beyond the plane, where 1 / 0 would make NaN of what is summed there
    each_vector(task.count, [&](int64_t i, auto n) {
        rstd.of[i / W] = first(rsqrt(squares.of[i / W] / count + a.eps), n);
    });
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t v = 0; v < VECTORS; ++v) {
            float* at = x + row * BLOCK + v * W;
            store(load(at) * rstd.of[v], at);
        }
    }
    return rstd;
}

// Writes value(row, vector) to the task's places of the result, row = frame * group_channels + c.
template <typename T, typename Value>
void write(const TemporalGroupNorm& a, const Task& task, Value value) {
    for (int64_t f = 0; f < a.frames; ++f) {
        for (int64_t c = 0; c < a.group_channels(); ++c) {
            const int64_t channel = task.group * a.group_channels() + c;
            T* to = static_cast<T*>(a.out) + task.first +
                    ((task.batch * a.frames + f) * a.channels + channel) * a.plane();
            each_vector(task.count, [&](int64_t i, auto n) {
                store(value(f * a.group_channels() + c, channel, i / W), to + i, n);
            });
        }
    }
}

template <typename T>
void forward(const TemporalGroupNorm& a, int64_t begin, int64_t end, float* x) {
    const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
    for (int64_t i = begin; i < end; ++i) {
        const Task task(a, i);
        gather<T>(a, a.x, task, x);
        normalise(a, task, x);
        write<T>(a, task, [&](int64_t row, int64_t channel, int64_t v) {
            const f32v y =
                load(x + row * BLOCK + v * W) * widen(weight[channel]) + widen(bias[channel]);
            return y / (exp(-y) + 1.0f);
        });
    }
}

template <typename T>
void differentiate(const TemporalGroupNorm& a, int64_t begin, int64_t end, float* x) {
    const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
    const int64_t inside = a.group_channels();
    const float count = static_cast<float>(a.frames * inside);
    float* inner = x + a.held();
    for (int64_t i = begin; i < end; ++i) {
        const Task task(a, i);
        gather<T>(a, a.x, task, x);
        gather<T>(a, a.grad, task, inner);
        const Positions rstd = normalise(a, task, x);
        for (int64_t c = 0; c < inside; ++c) {
            const float scale = widen(weight[task.group * inside + c]);
            const float shift = widen(bias[task.group * inside + c]);
            f32v product{}, total{};
            for (int64_t f = 0; f < a.frames; ++f) {
                for (int64_t v = 0; v < VECTORS; ++v) {
                    const int64_t at = (f * inside + c) * BLOCK + v * W;
                    const f32v y = load(x + at) * scale + shift, sigmoid = 1.0f / (exp(-y) + 1.0f);
                    const f32v outer = load(inner + at) * sigmoid * (y * (1.0f - sigmoid) + 1.0f);
                    product += outer * load(x + at);
                    total += outer;
                    store(outer * scale, inner + at);
                }
            }
            a.sums[2 * (i * inside + c)] = sum(product);
            a.sums[2 * (i * inside + c) + 1] = sum(total);
        }
        const Positions constant =
            sum_over(a, [&](int64_t at, int64_t) { return load(inner + at); });
        const Positions slope =
            sum_over(a, [&](int64_t at, int64_t) { return load(inner + at) * load(x + at); });
        write<T>(a, task, [&](int64_t row, int64_t, int64_t v) {
            const int64_t at = row * BLOCK + v * W;
            const f32v lost = (constant.of[v] + load(x + at) * slope.of[v]) / count;
            return (load(inner + at) - lost) * rstd.of[v];
        });
    }
}

template <typename T>
void merge(const TemporalGroupNorm& a, int64_t begin, int64_t end) {
    const int64_t inside = a.group_channels();
    for (int64_t c = begin * inside; c < end * inside; ++c) {
        double product = 0, total = 0;
        for (int64_t b = 0; b < a.batch; ++b) {
            for (int64_t block = 0; block < a.blocks(); ++block) {
                const int64_t task = (b * a.groups + c / inside) * a.blocks() + block;
                product += a.sums[2 * (task * inside + c % inside)];
                total += a.sums[2 * (task * inside + c % inside) + 1];
            }
        }
        narrow(static_cast<float>(product), static_cast<T*>(a.dweight) + c);
        narrow(static_cast<float>(total), static_cast<T*>(a.dbias) + c);
    }
}

}  // namespace

void temporal_group_norm(const TemporalGroupNorm& a, int64_t begin, int64_t end, float* scratch) {
    switch_dtype(a.dtype, [&](auto* p) {
        forward<std::remove_pointer_t<decltype(p)>>(a, begin, end, scratch);
    });
}

void temporal_group_norm_differentiate(const TemporalGroupNorm& a, int64_t begin, int64_t end,
                                       float* scratch) {
    switch_dtype(a.dtype, [&](auto* p) {
        differentiate<std::remove_pointer_t<decltype(p)>>(a, begin, end, scratch);
    });
}

void temporal_group_norm_merge(const TemporalGroupNorm& a, int64_t begin, int64_t end) {
    switch_dtype(a.dtype,
                 [&](auto* p) { merge<std::remove_pointer_t<decltype(p)>>(a, begin, end); });
}

}  // namespace tvk::TVK_LEVEL
