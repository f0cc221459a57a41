#include "cpu/kernels/temporal_attention.h"

#include <type_traits>

#include "cpu/common/vec.h"

namespace tvk::TVK_LEVEL {
namespace {

using temporal::padded;

// The frames of one tensor at one task, as float: frame f of head g is at data + f * row + g *
// dim.
struct Rows {
    const float* data;
    int64_t row;
};

// Reads a task's heads into `to`, frame after frame.
template <typename T>
Rows stage(const TemporalAttention& a, const TemporalAttention::View& x, const T* from,
           int64_t heads, float* to) {
    const int64_t row = temporal::row_floats(a);
    // Heads side by side are one run.
    const bool whole = x.dim == 1 && x.head == a.dim;
    const int64_t runs = whole ? 1 : heads, length = whole ? heads * a.dim : a.dim;
    for (int64_t f = 0; f < a.frames; ++f) {
        for (int64_t g = 0; g < runs; ++g) {
            const T* p = from + f * x.frame + g * x.head;
            float* put = to + f * row + g * a.dim;
            if (x.dim != 1) {
                for (int64_t d = 0; d < length; ++d) {
                    put[d] = widen(p[d * x.dim]);
                }
                continue;
            }
            int64_t d = 0;
            for (; d + W <= length; d += W) {
                store(load(p + d), put + d);
            }
            if (d < length) {
                store(load(p + d, static_cast<int>(length - d)), put + d);
            }
        }
    }
    return {to, row};
}

// The same for what is read once only: where it lies, if it lies as float.
template <typename T>
Rows in_place(const TemporalAttention& a, const TemporalAttention::View& x, const T* from,
              int64_t heads, float* to) {
    if constexpr (sizeof(T) == sizeof(float)) {
        if (x.dim == 1 && x.head == a.dim && a.dim % 4 == 0) {
            return {from, x.frame};
        }
    }
    return stage(a, x, from, heads, to);
}

// What the next task will read is on its way to L2 while this one is computed: 9.1 ms against 12.7
// at [1, 8, 1024, 8, 80] in float32, one thread.
template <typename T>
void prefetch(const TemporalAttention& a, const TemporalAttention::View& x, const T* from) {
    for (int64_t f = 0; f < a.frames; ++f) {
        const char* next = reinterpret_cast<const char*>(from + f * x.frame + a.group * x.head);
        const int64_t bytes = a.group * a.dim * static_cast<int64_t>(sizeof(T));
        for (int64_t i = 0; i < bytes; i += 64) {
            __builtin_prefetch(next + i, 0, 2);
        }
    }
}

// to[d * W + i] = from[i * row + d] for four i and four d.
inline void transpose4(const float* from, int64_t row, float* to) {
#if TVK_X86
    __m128 x0 = _mm_loadu_ps(from), x1 = _mm_loadu_ps(from + row);
    __m128 x2 = _mm_loadu_ps(from + 2 * row), x3 = _mm_loadu_ps(from + 3 * row);
    _MM_TRANSPOSE4_PS(x0, x1, x2, x3);
    _mm_store_ps(to, x0);
    _mm_store_ps(to + W, x1);
    _mm_store_ps(to + 2 * W, x2);
    _mm_store_ps(to + 3 * W, x3);
#else
    for (int d = 0; d < 4; ++d) {
        for (int i = 0; i < 4; ++i) {
            to[d * W + i] = from[i * row + d];
        }
    }
#endif
}

// scores[j] = q_t k_j for the W queries that q_t holds as columns and KEYS keys.
template <int KEYS>
inline void products(const float* q_t, const float* k, int64_t row, int64_t dim, float scale,
                     float* scores) {
    f32v sums[KEYS];
    for (f32v& sum : sums) {
        sum = f32v{};  // "= {}" on the array becomes a slow rep stos in g++ 12
    }
    for (int64_t d = 0; d < dim; ++d) {
        const f32v q = load(q_t + d * W);
        for (int j = 0; j < KEYS; ++j) {
            sums[j] += q * k[j * row + d];
        }
    }
    for (int j = 0; j < KEYS; ++j) {
        store(sums[j] * scale, scores + j * W);
    }
}

// Softmax over the keys of every column, in place.
inline void softmax(float* scores, int64_t keys) {
    f32v most = load(scores);
    for (int64_t j = 1; j < keys; ++j) {
        most = max(most, load(scores + j * W));
    }
    f32v total = {};
    for (int64_t j = 0; j < keys; ++j) {
        const f32v e = exp(load(scores + j * W) - most);
        store(e, scores + j * W);
        total += e;
    }
    const f32v share = splat(1.0f) / total;
    for (int64_t j = 0; j < keys; ++j) {
        store(load(scores + j * W) * share, scores + j * W);
    }
}

// QUERIES rows of the result, from `shares` of the keys: VECTORS vectors from column d on, or with
// TAIL the last `left` columns.
template <int QUERIES, int VECTORS, bool TAIL, typename T>
inline void weighted(const float* shares, const float* v, int64_t row, int64_t keys, int left,
                     T* out, int64_t out_row) {
    f32v sums[QUERIES * VECTORS];
    for (f32v& sum : sums) {
        sum = f32v{};
    }
    for (int64_t j = 0; j < keys; ++j) {
        for (int c = 0; c < VECTORS; ++c) {
            const f32v x = TAIL ? load(v + j * row, left) : load(v + j * row + c * W);
            for (int i = 0; i < QUERIES; ++i) {
                sums[i * VECTORS + c] += x * shares[j * W + i];
            }
        }
    }
    for (int i = 0; i < QUERIES; ++i) {
        for (int c = 0; c < VECTORS; ++c) {
            if constexpr (TAIL) {
                store(sums[i], out + i * out_row, left);
            } else {
                store(sums[i * VECTORS + c], out + i * out_row + c * W);
            }
        }
    }
}

template <int QUERIES, typename T>
void weighted_rows(const float* shares, Rows v, int64_t keys, int64_t dim, T* out,
                   int64_t out_row) {
    int64_t d = 0;
    for (; d + 2 * W <= dim; d += 2 * W) {
        weighted<QUERIES, 2, false>(shares, v.data + d, v.row, keys, 0, out + d, out_row);
    }
    if (d + W <= dim) {
        weighted<QUERIES, 1, false>(shares, v.data + d, v.row, keys, 0, out + d, out_row);
        d += W;
    }
    if (d < dim) {
        const int left = static_cast<int>(dim - d);
        weighted<QUERIES, 1, true>(shares, v.data + d, v.row, keys, left, out + d, out_row);
    }
}

// One head at one position; q_t [dim, W] and scores [frames, W] are scratch.
template <typename T>
void head(const TemporalAttention& a, Rows q, Rows k, Rows v, float* q_t, float* scores, T* out,
          int64_t out_row) {
    const int64_t frames = a.frames;
    for (int64_t first = 0; first < frames; first += W) {
        const int64_t rest = frames - first, queries = rest < W ? rest : W;
        int64_t at = 0;
        for (; at + 4 <= queries; at += 4) {
            for (int64_t d = 0; d < a.dim; d += 4) {
                transpose4(q.data + (first + at) * q.row + d, q.row, q_t + d * W + at);
            }
        }
        for (; at < queries; ++at) {
            for (int64_t d = 0; d < a.dim; ++d) {
                q_t[d * W + at] = q.data[(first + at) * q.row + d];
            }
        }
        int64_t j = 0;
        for (; j + 8 <= frames; j += 8) {
            products<8>(q_t, k.data + j * k.row, k.row, a.dim, a.scale, scores + j * W);
        }
        for (; j + 4 <= frames; j += 4) {
            products<4>(q_t, k.data + j * k.row, k.row, a.dim, a.scale, scores + j * W);
        }
        for (; j < frames; ++j) {
            products<1>(q_t, k.data + j * k.row, k.row, a.dim, a.scale, scores + j * W);
        }
        softmax(scores, frames);
        int64_t i = 0;
        for (; i + 4 <= queries; i += 4) {
            weighted_rows<4>(scores + i, v, frames, a.dim, out + (first + i) * out_row, out_row);
        }
        for (; i < queries; ++i) {
            weighted_rows<1>(scores + i, v, frames, a.dim, out + (first + i) * out_row, out_row);
        }
    }
}

template <typename T>
const T* start(const TemporalAttention::View& x, int64_t b, int64_t n, int64_t h) {
    return static_cast<const T*>(x.data) + b * x.batch + n * x.token + h * x.head;
}

template <typename T>
void tasks(const TemporalAttention& a, int64_t begin, int64_t end, float* scratch) {
    const int64_t tensor = padded(a.frames, 4) * temporal::row_floats(a);
    float *q_to = scratch, *k_to = q_to + tensor, *v_to = k_to + tensor, *q_t = v_to + tensor;
    float* scores = q_t + padded(a.dim, 4) * temporal::MAX_WIDTH;
    // The frames and queries that fill the last vector are computed too, and must hold numbers.
    std::memset(scratch, 0, a.scratch_floats() * sizeof(float));
    const int64_t out_row = a.tokens * a.heads * a.dim;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t h = task % a.groups() * a.group, position = task / a.groups();
        const int64_t n = position % a.tokens, b = position / a.tokens;
        const int64_t left = a.heads - h, heads = left < a.group ? left : a.group;
        const T *q_at = start<T>(a.q, b, n, h), *k_at = start<T>(a.k, b, n, h);
        const T* v_at = start<T>(a.v, b, n, h);
        const Rows k = stage(a, a.k, k_at, heads, k_to);
        prefetch(a, a.k, k_at);
        const Rows q = in_place(a, a.q, q_at, heads, q_to);
        prefetch(a, a.q, q_at);
        const Rows v = in_place(a, a.v, v_at, heads, v_to);
        prefetch(a, a.v, v_at);
        T* out = static_cast<T*>(a.out) + b * a.frames * out_row + (n * a.heads + h) * a.dim;
        for (int64_t g = 0; g < heads; ++g) {
            const int64_t at = g * a.dim;
            head(a, {q.data + at, q.row}, {k.data + at, k.row}, {v.data + at, v.row}, q_t, scores,
                 out + at, out_row);
        }
    }
}

}  // namespace

void temporal_attention(const TemporalAttention& a, int64_t begin, int64_t end, float* scratch) {
    switch_dtype(a.dtype, [&](auto* p) {
        tasks<std::remove_pointer_t<decltype(p)>>(a, begin, end, scratch);
    });
}

}  // namespace tvk::TVK_LEVEL
