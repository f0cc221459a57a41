#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kernels/attention.h"
#include "cpu/kernels/frame_attention.h"

namespace tvk::TVK_LEVEL {
namespace {

static_assert(FrameAttentionBackward::STEP % W == 0, "whole vectors");

// Rows of sums, and vectors of their columns, that one product takes at a time.
constexpr int HIGH = 4, WIDE = 3;

// One thread's scratch: what a query frame reads, and a group of its queries.
struct Work {
    float *keys, *values;       // [longest][dim]
    float *dkeys, *dvalues;     // [longest][wide]
    float* bias;                // [longest]
    float *p, *slope;           // [longest][lanes]
    float *q, *grad, *dq;       // [dim][lanes]
    float *q_rows, *grad_rows;  // [lanes][wide], zeros beyond dim
    float* staged;
    int64_t size = 0;  // keys

    Work(const FrameAttentionBackward& a, float* next) {
        const auto take = [&](int64_t floats) {
            float* taken = next;
            next += floats;
            return taken;
        };
        const int64_t longest = a.longest + 8, lanes = a.lanes();
        keys = take(longest * a.dim);
        values = take(longest * a.dim);
        dkeys = take(longest * a.wide);
        dvalues = take(longest * a.wide);
        bias = take(longest);
        p = take(longest * lanes);
        slope = take(longest * lanes);
        q = take(lanes * a.dim);
        grad = take(lanes * a.dim);
        dq = take(lanes * a.dim);
        q_rows = take(2 * lanes * a.wide);
        grad_rows = q_rows + lanes * a.wide;
        staged = take(4 * a.dim);
        std::memset(q_rows, 0, 2 * lanes * a.wide * sizeof(float));
    }
};

template <typename T>
void copy(const T* p, int64_t by, int64_t dim, float* to) {
    const float* found = dense(p, by, dim, to);
    if (found != to) {
        std::memcpy(to, found, dim * sizeof(float));
    }
}

// The keys and values that a query frame reads, one after the other; none has a gradient yet.
template <typename T>
void gather(const FrameAttentionBackward& a, int64_t b, int64_t head, int64_t frame, Work& work) {
    work.size = 0;
    for (int32_t s = a.row_ptr[frame]; s < a.row_ptr[frame + 1]; ++s) {
        const int32_t* segment = a.segments + 4 * s;
        const int slot = a.slot(segment);
        const int64_t source = segment[0], cells = a.cells(slot);
        const float weight = segment[2] == 1 ? 0.0f : std::log(static_cast<float>(segment[2]));
        float* keys = work.keys + work.size * a.dim;
        float* values = work.values + work.size * a.dim;
        if (slot < 0) {
            const T* k =
                static_cast<const T*>(a.k) + b * a.k_by.b + source * a.k_by.f + head * a.k_by.h;
            const T* v =
                static_cast<const T*>(a.v) + b * a.v_by.b + source * a.v_by.f + head * a.v_by.h;
            for (int64_t n = 0; n < cells; ++n) {
                copy(k + n * a.k_by.n, a.k_by.d, a.dim, keys + n * a.dim);
                copy(v + n * a.v_by.n, a.v_by.d, a.dim, values + n * a.dim);
            }
        } else {
            const int64_t at = ((b * a.frames + source) * a.heads + head) * cells * a.dim;
            std::memcpy(keys, a.coarse[slot].k + at, cells * a.dim * sizeof(float));
            std::memcpy(values, a.coarse[slot].v + at, cells * a.dim * sizeof(float));
        }
        for (int64_t n = 0; n < cells; ++n) {
            const bool sized = slot >= 0 && segment[3] != 0;
            work.bias[work.size + n] = sized ? weight + a.coarse[slot].size_bias[n] : weight;
        }
        work.size += cells;
    }
    std::memset(work.dkeys, 0, work.size * a.wide * sizeof(float));
    std::memset(work.dvalues, 0, work.size * a.wide * sizeof(float));
}

// c[n][0 .. V * W) += sum over i < count of a[n][i] * b[i][0 .. V * W) for `rows` rows; those of
// b and c lie `wide` apart, those of a `by`.
template <int V>
void add_product(const float* a, int64_t by, int64_t rows, const float* b, int64_t count,
                 int64_t wide, float* c) {
    for (int64_t n = 0; n < rows; n += HIGH) {
        const float* row[HIGH];  // beyond the last the last again, computed and dropped
        f32v sums[HIGH][V];
#pragma GCC unroll 4
        for (int r = 0; r < HIGH; ++r) {
            row[r] = a + (n + r < rows ? n + r : rows - 1) * by;
#pragma GCC unroll 3
            for (int j = 0; j < V; ++j) {
                sums[r][j] = f32v{};
            }
        }
        for (int64_t i = 0; i < count; ++i) {
            f32v found[V];
#pragma GCC unroll 3
            for (int j = 0; j < V; ++j) {
                found[j] = load(b + i * wide + j * W);
            }
#pragma GCC unroll 4
            for (int r = 0; r < HIGH; ++r) {
                const f32v weight = splat(row[r][i]);
#pragma GCC unroll 3
                for (int j = 0; j < V; ++j) {
                    sums[r][j] += weight * found[j];
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < HIGH; ++r) {
            if (n + r >= rows) {
                break;
            }
#pragma GCC unroll 3
            for (int j = 0; j < V; ++j) {
                float* at = c + (n + r) * wide + j * W;
                store(load(at) + sums[r][j], at);
            }
        }
    }
}

void add_product(const float* a, int64_t by, int64_t rows, const float* b, int64_t count,
                 int64_t wide, float* c) {
    const int64_t vectors = wide / W, turns = (vectors + WIDE - 1) / WIDE;
    for (int64_t turn = 0; turn < turns; ++turn) {
        const int64_t first = turn * vectors / turns, last = (turn + 1) * vectors / turns;
        switch (last - first) {
            case 3:
                add_product<3>(a, by, rows, b + first * W, count, wide, c + first * W);
                break;
            case 2:
                add_product<2>(a, by, rows, b + first * W, count, wide, c + first * W);
                break;
            default:
                add_product<1>(a, by, rows, b + first * W, count, wide, c + first * W);
        }
    }
}

// dq of a group of queries, and what they add to dk and dv, all without the factor of the scores.
// `through` is the gradient of their log-sum-exp.
template <int V>
void differentiate(const FrameAttentionBackward& a, const Work& work, int64_t queries,
                   const f32v* through) {
    constexpr int64_t LANES = V * W;
    const int dim = static_cast<int>(a.dim);
    f32v highest[V], unused[V], sums[V], share[V], mean[V], keep[V];
    for (int j = 0; j < V; ++j) {
        highest[j] = unused[j] = splat(-__builtin_inff());
        sums[j] = mean[j] = f32v{};
        keep[j] = splat(1.0f);
    }
    Tile tile;
    const auto each_tile = [&](auto run) {
        for (int64_t first = 0; first < work.size; first += TILE) {
            const int64_t left = work.size - first;
            run(first, static_cast<int>(left < TILE ? left : TILE), work.p + first * LANES,
                work.slope + first * LANES);
        }
    };
    each_tile([&](int64_t first, int size, float* p, float* slope) {
        tile.point(work.keys + first * dim, dim, size);
        std::memcpy(tile.bias, work.bias + first, size * sizeof(float));
        tile.scale = a.scale;
        tile.seal();
        score<V>(tile, work.q, dim, p, highest);
        tile.point(work.values + first * dim, dim, size);
        std::memset(tile.bias, 0, sizeof(tile.bias));
        tile.scale = 1.0f;
        tile.seal();
        score<V>(tile, work.grad, dim, slope, unused);
    });
    each_tile([&](int64_t, int size, float* p, float* slope) {
        f32v part[V], sloped[V];
        exponentiate<V>(size, p, highest, part);
        for (int j = 0; j < V; ++j) {
            sums[j] += part[j];
            sloped[j] = f32v{};
        }
        for (int i = 0; i < size; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) {
                sloped[j] += load(p + i * LANES + j * W) * load(slope + i * LANES + j * W);
            }
        }
        for (int j = 0; j < V; ++j) {
            mean[j] += sloped[j];
        }
    });
    for (int j = 0; j < V; ++j) {
        share[j] = 1.0f / sums[j];
        mean[j] = mean[j] * share[j] - through[j];
    }
    std::memset(work.dq, 0, LANES * dim * sizeof(float));
    each_tile([&](int64_t first, int size, float* p, float* slope) {
        for (int i = 0; i < size; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) {
                const int64_t at = i * LANES + j * W;
                const f32v weight = load(p + at) * share[j];
                store(weight, p + at);
                store(weight * (load(slope + at) - mean[j]), slope + at);
            }
        }
        tile.point(work.keys + first * dim, dim, size);
        weigh<V>(tile, slope, dim, keep, work.dq);
        const int64_t wide = a.wide, at = first * wide;
        add_product(p, LANES, size, work.grad_rows, queries, wide, work.dvalues + at);
        add_product(slope, LANES, size, work.q_rows, queries, wide, work.dkeys + at);
    });
}

template <typename T>
void differentiate_frame(const FrameAttentionBackward& a, Work& work, int64_t b, int64_t head,
                         int64_t frame) {
    const T* q = static_cast<const T*>(a.q) + b * a.q_by.b + frame * a.q_by.f + head * a.q_by.h;
    const T* grad =
        static_cast<const T*>(a.grad) + b * a.grad_by.b + frame * a.grad_by.f + head * a.grad_by.h;
    T* dq =
        static_cast<T*>(a.out) + (((b * a.frames_q + frame) * a.tokens) * a.heads + head) * a.dim;
    const Groups groups(a.tokens, a.lanes() / W < VECTORS ? a.lanes() / W : VECTORS);
    for (int64_t g = 0; g < groups.count; ++g) {
        const int64_t first = groups.first(g) * W, lanes = groups.size(g) * W;
        const int64_t queries = a.tokens - first < lanes ? a.tokens - first : lanes;
        const T* q_at = q + first * a.q_by.n;
        const T* grad_at = grad + first * a.grad_by.n;
        pack(q_at, a.q_by.n, a.q_by.d, queries, a.dim, lanes, work.staged, work.q);
        pack(grad_at, a.grad_by.n, a.grad_by.d, queries, a.dim, lanes, work.staged, work.grad);
        float through[VECTORS * W] = {};
        for (int64_t i = 0; i < queries; ++i) {
            copy(q_at + i * a.q_by.n, a.q_by.d, a.dim, work.q_rows + i * a.wide);
            copy(grad_at + i * a.grad_by.n, a.grad_by.d, a.dim, work.grad_rows + i * a.wide);
            if (a.grad_lse != nullptr) {
                const Axes& by = a.grad_lse_by;
                through[i] =
                    a.grad_lse[b * by.b + frame * by.f + (first + i) * by.n + head * by.h];
            }
        }
        f32v vectors[VECTORS], factors[VECTORS];
        for (int j = 0; j < VECTORS; ++j) {
            vectors[j] = load(through + j * W);
            factors[j] = splat(a.scale);
        }
        switch (groups.size(g)) {
            case 4:
                differentiate<VECTORS>(a, work, queries, vectors);
                break;
            case 3:
                differentiate<3>(a, work, queries, vectors);
                break;
            case 2:
                differentiate<2>(a, work, queries, vectors);
                break;
            default:
                differentiate<1>(a, work, queries, vectors);
        }
        multiply(work.dq, lanes, a.dim, factors);
        unpack(work.dq, lanes, queries, a.dim, work.staged, dq + first * a.heads * a.dim,
               a.heads * a.dim);
    }
}

// What a query frame's keys and values have received joins the sums.
void scatter(const FrameAttentionBackward& a, const Work& work, int64_t frame, float* sums) {
    const int64_t wide = a.wide;
    int64_t done = 0;
    for (int32_t s = a.row_ptr[frame]; s < a.row_ptr[frame + 1]; ++s) {
        const int32_t* segment = a.segments + 4 * s;
        const int slot = a.slot(segment);
        const int64_t numbers = a.cells(slot) * wide;
        float* dk = sums + a.row(slot, segment[0]) * wide;
        float* dv = dk + a.rows() * wide;
        for (int64_t i = 0; i < numbers; i += W) {
            store(load(dk + i) + load(work.dkeys + done + i), dk + i);
            store(load(dv + i) + load(work.dvalues + done + i), dv + i);
        }
        done += numbers;
    }
}

template <typename T>
void run(const FrameAttentionBackward& a, float* scratch, int64_t begin, int64_t end) {
    Work work(a, scratch);
    for (int64_t task = begin; task < end; ++task) {
        const int64_t head = task % a.heads, b = task / a.heads % a.batch;
        const int64_t part = task / a.heads / a.batch;
        const int64_t last = (part + 1) * a.frames_q / a.parts;
        for (int64_t frame = part * a.frames_q / a.parts; frame < last; ++frame) {
            gather<T>(a, b, head, frame, work);
            differentiate_frame<T>(a, work, b, head, frame);
            scatter(a, work, frame, a.sums + task * 2 * a.rows() * a.wide);
        }
    }
}

template <typename T>
void collect(const FrameAttentionBackward& a, float* whole, int64_t begin, int64_t end) {
    const int64_t wide = a.wide, size = a.rows() * wide;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task % a.tokens, frame = task / a.tokens % a.frames;
        const int64_t b = task / a.tokens / a.frames;
        for (int64_t i = 0; i < 2 * a.heads; ++i) {
            const int64_t head = i / 2, values = i % 2;
            std::memset(whole, 0, wide * sizeof(float));
            const auto add = [&](int64_t row, float share) {
                for (int64_t part = 0; part < a.parts; ++part) {
                    const int64_t at = (part * a.batch + b) * a.heads + head;
                    const float* sums = a.sums + (2 * at + values) * size + row * wide;
                    for (int64_t d = 0; d < wide; d += W) {
                        store(load(whole + d) + load(sums + d) * share, whole + d);
                    }
                }
            };
            const float factor = values ? 1.0f : a.scale;
            add(a.row(-1, frame) + n, factor);
            for (int slot = 0; slot < a.MAX_LEVELS; ++slot) {
                const int64_t level = a.coarse[slot].level;
                if (level == 0 || !a.wanted[slot * a.frames + frame]) {
                    continue;
                }
                const int64_t y = n / a.w / level, x = n % a.w / level;
                const int64_t high = a.h - y * level < level ? a.h - y * level : level;
                const int64_t across = a.w - x * level < level ? a.w - x * level : level;
                add(a.row(slot, frame) + y * ((a.w + level - 1) / level) + x,
                    factor / static_cast<float>(high * across));
            }
            T* to = static_cast<T*>(values ? a.dv : a.dk) + (task * a.heads + head) * a.dim;
            each_vector(a.dim, [&](int64_t d, auto n) { store(load(whole + d), to + d, n); });
        }
    }
}

}  // namespace

void frame_attention_backward(const FrameAttentionBackward& a, float* scratch, int64_t begin,
                              int64_t end) {
    switch_dtype(a.dtype, [&](auto* p) {
        run<std::remove_pointer_t<decltype(p)>>(a, scratch, begin, end);
    });
}

void frame_attention_collect(const FrameAttentionBackward& a, float* scratch, int64_t begin,
                             int64_t end) {
    switch_dtype(a.dtype, [&](auto* p) {
        collect<std::remove_pointer_t<decltype(p)>>(a, scratch, begin, end);
    });
}

}  // namespace tvk::TVK_LEVEL
