#include "cpu/kernels/token_map_attention.h"

#include <type_traits>

#include "cpu/kernels/attention.h"

namespace tvk::TVK_LEVEL {
namespace {

using A = TokenMapAttention;

static_assert(A::TILE == TILE && VECTORS * W <= A::LANES, "scratch");

// Keys and values of one head of one text, tile by tile.
template <typename T>
struct Text {
    const A& a;
    const T* k;
    const T* v;
    float* staged;
    Tile tile;
    int64_t at = -1;  // where the tile begins

    const Tile& from(int64_t first) {
        if (first == at) {
            return tile;
        }
        at = first;
        tile.scale = a.scale;
        tile.size = static_cast<int>(a.length - first < TILE ? a.length - first : TILE);
        for (int n = 0; n < tile.size; ++n) {
            float* row = staged + 2 * n * a.dim;
            tile.keys[n] = dense(k + (first + n) * a.k_l, a.k_d, a.dim, row);
            tile.values[n] = dense(v + (first + n) * a.v_l, a.v_d, a.dim, row + a.dim);
            tile.bias[n] = 0.0f;
        }
        tile.seal();
        return tile;
    }
};

// One group's softmax over all words: o gets its results, `maps` the chosen words' shares.
template <int V, typename T>
void attend(Text<T>& text, const float* q, float* p, float* o, float* maps) {
    const A& a = text.a;
    const int dim = static_cast<int>(a.dim);
    f32v highest[V], sums[V], ones[V];
    for (int j = 0; j < V; ++j) {
        highest[j] = splat(-__builtin_inff());
        ones[j] = splat(1.0f);
    }
    for (int64_t n = 0; n < a.length; n += TILE) {
        score<V>(text.from(n), q, dim, p + n * V * W, highest);
    }
    exponentiate<V>(static_cast<int>(a.length), p, highest, sums);
    for (int j = 0; j < V; ++j) {
        sums[j] = 1.0f / sums[j];
    }
    for (int64_t i = 0; i < a.dim * V * W; i += W) {
        store(f32v{}, o + i);
    }
    for (int64_t n = 0; n < a.length; n += TILE) {
        weigh<V>(text.from(n), p + n * V * W, dim, ones, o);
    }
    multiply(o, V * W, a.dim, sums);
    for (int64_t t = 0; t < a.words; ++t) {
        for (int j = 0; j < V; ++j) {
            float* map = maps + t * a.block + j * W;
            store(load(p + (a.chosen[t] * V + j) * W) * sums[j] + load(map), map);
        }
    }
}

template <typename T>
void run(const A& a, float* scratch, int64_t begin, int64_t end) {
    float* maps = scratch;
    float* q = maps + a.words * a.block;
    float* o = q + A::LANES * a.dim;
    float* p = o + A::LANES * a.dim;
    float* staged = p + A::LANES * (a.length + 8);
    const float share = 1.0f / static_cast<float>(a.heads);
    for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % a.blocks() * a.block, image = task / a.blocks();
        const int64_t frame = image % a.frames, b = image / a.frames;
        const int64_t left = a.tokens - first, queries = left < a.block ? left : a.block;
        const int64_t at = image * a.tokens + first, row = a.heads * a.dim;
        const Groups groups(queries);
        for (int64_t i = 0; i < a.words * a.block; i += W) {
            store(f32v{}, maps + i);
        }
        for (int64_t head = 0; head < a.heads; ++head) {
            Text<T> text = {a,
                            static_cast<const T*>(a.k) + b * a.k_b + head * a.k_h,
                            static_cast<const T*>(a.v) + b * a.v_b + head * a.v_h,
                            staged,
                            {}};
            const T* from = static_cast<const T*>(a.q) + b * a.q_b + frame * a.q_f +
                            first * a.q_n + head * a.q_h;
            T* to = static_cast<T*>(a.out) + at * row + head * a.dim;
            for (int64_t g = 0; g < groups.count; ++g) {
                const int64_t start = groups.first(g) * W, lanes = groups.size(g) * W;
                const int64_t some = queries - start < lanes ? queries - start : lanes;
                // Weights are not yet there: their memory serves rows on their way into lanes.
                pack(from + start * a.q_n, a.q_n, a.q_d, some, a.dim, lanes, o, q);
                switch (groups.size(g)) {
                    case 4:
                        attend<VECTORS>(text, q, p, o, maps + start);
                        break;
                    case 3:
                        attend<3>(text, q, p, o, maps + start);
                        break;
                    case 2:
                        attend<2>(text, q, p, o, maps + start);
                        break;
                    default:
                        attend<1>(text, q, p, o, maps + start);
                }
                unpack(o, lanes, some, a.dim, q, to + start * row, row);
            }
        }
        T* to = static_cast<T*>(a.maps) + at * a.words;
        for (int64_t i = 0; i < queries; ++i) {
            for (int64_t t = 0; t < a.words; ++t) {
                narrow(maps[t * a.block + i] * share, to + i * a.words + t);
            }
        }
    }
}

}  // namespace

void token_map_attention(const A& a, float* scratch, int64_t begin, int64_t end) {
    switch_dtype(a.dtype, [&](auto* p) {
        run<std::remove_pointer_t<decltype(p)>>(a, scratch, begin, end);
    });
}

}  // namespace tvk::TVK_LEVEL
