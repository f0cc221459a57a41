#include "cpu/kernels/frame_attention.h"

#include <cmath>
#include <type_traits>

#include "cpu/kernels/attention.h"

namespace tvk::TVK_LEVEL {
namespace {

static_assert(FrameAttention::TILE == TILE && VECTORS * W <= FrameAttention::LANES, "scratch");

// One block of queries in a thread's scratch.
struct Block {
    Groups groups;
    f32v* highest;
    f32v* sums;
    float* p;
    float* q;
    float* o;
    float* staged;  // rows that are not dense floats where they are

    Block(const FrameAttention& a, float* scratch, int64_t queries) : groups(queries) {
        highest = reinterpret_cast<f32v*>(scratch);
        sums = highest + a.block / W;
        p = scratch + 2 * a.block;
        q = p + FrameAttention::TILE * FrameAttention::LANES;
        o = q + a.block * a.dim;
        staged = o + a.block * a.dim;
    }
};

// The highest of no scores. No constant: what sets one up would run at every level.
f32v nothing() { return splat(-__builtin_inff()); }

template <typename T>
void begin_block(const Block& block, const FrameAttention& a, const T* q, int64_t queries) {
    for (int64_t g = 0; g < block.groups.count; ++g) {
        const int64_t first = block.groups.first(g) * W, lanes = block.groups.size(g) * W;
        pack(q + first * a.q_by.n, a.q_by.n, a.q_by.d, queries - first, a.dim, lanes, block.staged,
             block.q + first * a.dim);
    }
    for (int64_t i = 0; i < block.groups.vectors; ++i) {
        block.highest[i] = nothing();
        block.sums[i] = f32v{};
    }
    for (int64_t i = 0; i < block.groups.vectors * W * a.dim; i += W) {
        store(f32v{}, block.o + i);
    }
}

template <typename T>
void end_block(const Block& block, const FrameAttention& a, int64_t queries, T* out, float* lse) {
    for (int64_t g = 0; g < block.groups.count; ++g) {
        const int64_t first = block.groups.first(g) * W, lanes = block.groups.size(g) * W;
        float* o = block.o + first * a.dim;
        f32v shares[VECTORS];
        for (int64_t j = 0; j < block.groups.size(g); ++j) {
            const f32v top = block.highest[first / W + j];
            // Softmax of nothing but -inf is NaN.
            shares[j] =
                top == nothing() ? nothing() - nothing() : 1.0f / block.sums[first / W + j];
        }
        multiply(o, lanes, a.dim, shares);
        const int64_t left = queries - first, row = a.heads * a.dim;
        unpack(o, lanes, left < lanes ? left : lanes, a.dim, block.staged, out + first * row, row);
    }
    for (int64_t i = 0; lse != nullptr && i < queries; ++i) {
        lse[i * a.heads] = block.highest[i / W][i % W] + std::log(block.sums[i / W][i % W]);
    }
}

template <int V>
void attend_group(const Block& block, const Tile& tile, int dim, int64_t first) {
    f32v before[V], top[V], sums[V], keep[V];
    for (int j = 0; j < V; ++j) {
        before[j] = block.highest[first + j];
    }
    score<V>(tile, block.q + first * W * dim, dim, block.p, block.highest + first);
    for (int j = 0; j < V; ++j) {
        // Where every score so far is -inf, -inf less itself would be NaN for good.
        const f32v highest = block.highest[first + j];
        top[j] = highest == nothing() ? f32v{} : highest;
    }
    exponentiate<V>(tile.size, block.p, top, sums);
    for (int j = 0; j < V; ++j) {
        keep[j] = exp_below(before[j] - top[j]);
        block.sums[first + j] = block.sums[first + j] * keep[j] + sums[j];
    }
    weigh<V>(tile, block.p, dim, keep, block.o + first * W * dim);
}

void attend(const Block& block, Tile& tile, int dim) {
    tile.seal();
    for (int64_t g = 0; g < block.groups.count; ++g) {
        const int64_t first = block.groups.first(g);
        switch (block.groups.size(g)) {
            case 4:
                attend_group<VECTORS>(block, tile, dim, first);
                break;
            case 3:
                attend_group<3>(block, tile, dim, first);
                break;
            case 2:
                attend_group<2>(block, tile, dim, first);
                break;
            default:
                attend_group<1>(block, tile, dim, first);
        }
    }
    tile.size = 0;
}

template <typename T>
void run(const FrameAttention& a, float* scratch, int64_t begin, int64_t end) {
    const int64_t blocks = a.blocks();
    const int dim = static_cast<int>(a.dim);
    Tile tile;
    tile.scale = a.scale;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % blocks * a.block, head = task / blocks % a.heads;
        const int64_t frame = task / blocks / a.heads % a.frames_q;
        const int64_t b = task / blocks / a.heads / a.frames_q;
        const int64_t queries = a.tokens - first < a.block ? a.tokens - first : a.block;
        const Block block(a, scratch, queries);
        const T* q = static_cast<const T*>(a.q) + b * a.q_by.b + frame * a.q_by.f +
                     head * a.q_by.h + first * a.q_by.n;
        begin_block(block, a, q, queries);
        // Tiles run on from one segment to the next: coarse frames can be smaller than a tile.
        for (int32_t s = a.row_ptr[frame]; s < a.row_ptr[frame + 1]; ++s) {
            const int32_t* segment = a.segments + 4 * s;
            const int64_t source = segment[0], level = segment[1];
            const float weight = segment[2] == 1 ? 0.0f : std::log(static_cast<float>(segment[2]));
            if (level == 0) {
                const T* k = static_cast<const T*>(a.k) + b * a.k_by.b + source * a.k_by.f +
                             head * a.k_by.h;
                const T* v = static_cast<const T*>(a.v) + b * a.v_by.b + source * a.v_by.f +
                             head * a.v_by.h;
                for (int64_t n = 0; n < a.tokens; ++n) {
                    float* staged = block.staged + 2 * tile.size * a.dim;
                    tile.keys[tile.size] = dense(k + n * a.k_by.n, a.k_by.d, a.dim, staged);
                    tile.values[tile.size] =
                        dense(v + n * a.v_by.n, a.v_by.d, a.dim, staged + a.dim);
                    tile.bias[tile.size] = weight;
                    if (++tile.size == TILE) {
                        attend(block, tile, dim);
                    }
                }
            } else {
                const auto& coarse = a.coarse[a.coarse[0].level == level ? 0 : 1];
                const int64_t at = ((b * a.frames + source) * a.heads + head) * coarse.cells;
                const float* bias = segment[3] != 0 ? coarse.size_bias : nullptr;
                for (int64_t n = 0; n < coarse.cells; ++n) {
                    tile.keys[tile.size] = coarse.k + (at + n) * a.dim;
                    tile.values[tile.size] = coarse.v + (at + n) * a.dim;
                    tile.bias[tile.size] = bias != nullptr ? weight + bias[n] : weight;
                    if (++tile.size == TILE) {
                        attend(block, tile, dim);
                    }
                }
            }
        }
        if (tile.size > 0) {
            attend(block, tile, dim);
        }
        const int64_t at = (b * a.frames_q + frame) * a.tokens + first;
        end_block(block, a, queries, static_cast<T*>(a.out) + (at * a.heads + head) * a.dim,
                  a.lse == nullptr ? nullptr : a.lse + at * a.heads + head);
    }
}

// to[head][cells][dim] at one cell: the average of rows x columns tokens from p on.
template <typename T>
void average(const FrameAttention& a, const T* p, const Axes& by, int64_t rows, int64_t columns,
             int64_t cells, float* to) {
    const float share = 1.0f / static_cast<float>(rows * columns);
    for (int64_t head = 0; head < a.heads; ++head) {
        float* sums = to + head * cells * a.dim;
        for (int64_t d = 0; d < a.dim; ++d) {
            sums[d] = 0.0f;
        }
        for (int64_t y = 0; y < rows; ++y) {
            for (int64_t x = 0; x < columns; ++x) {
                const T* token = p + (y * a.w + x) * by.n + head * by.h;
                int64_t d = 0;
                for (; by.d == 1 && d + W <= a.dim; d += W) {
                    store(load(sums + d) + load(token + d), sums + d);
                }
                for (; d < a.dim; ++d) {
                    sums[d] += widen(token[d * by.d]);
                }
            }
        }
        for (int64_t d = 0; d < a.dim; ++d) {
            sums[d] *= share;
        }
    }
}

template <typename T>
void pool(const FrameAttention& a, int slot, int64_t begin, int64_t end) {
    const auto& coarse = a.coarse[slot];
    const int64_t level = coarse.level, high = (a.h + level - 1) / level;
    const int64_t wide = (a.w + level - 1) / level;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t y = task % high, frame = task / high % a.frames, b = task / high / a.frames;
        if (!a.wanted[slot * a.frames + frame]) {
            continue;
        }
        const int64_t rows = a.h - y * level < level ? a.h - y * level : level;
        for (int64_t x = 0; x < wide; ++x) {
            const int64_t columns = a.w - x * level < level ? a.w - x * level : level;
            const int64_t token = y * level * a.w + x * level;
            const int64_t to =
                ((b * a.frames + frame) * a.heads * coarse.cells + y * wide + x) * a.dim;
            const T* k = static_cast<const T*>(a.k) + b * a.k_by.b + frame * a.k_by.f;
            const T* v = static_cast<const T*>(a.v) + b * a.v_by.b + frame * a.v_by.f;
            average(a, k + token * a.k_by.n, a.k_by, rows, columns, coarse.cells, coarse.k + to);
            average(a, v + token * a.v_by.n, a.v_by, rows, columns, coarse.cells, coarse.v + to);
        }
    }
}

}  // namespace

void frame_attention(const FrameAttention& a, float* scratch, int64_t begin, int64_t end) {
    switch_dtype(a.dtype, [&](auto* p) {
        run<std::remove_pointer_t<decltype(p)>>(a, scratch, begin, end);
    });
}

void frame_attention_pool(const FrameAttention& a, int slot, int64_t begin, int64_t end) {
    switch_dtype(a.dtype,
                 [&](auto* p) { pool<std::remove_pointer_t<decltype(p)>>(a, slot, begin, end); });
}

}  // namespace tvk::TVK_LEVEL
