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
            each_vector(length, [&](int64_t d, auto n) { store(load(p + d, n), put + d); });
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

// scores[j] = q_t k_j for the W queries that q_t holds as columns and KEYS keys; those of one key
// lie `apart` from those of the next.
template <int KEYS>
inline void products(const float* q_t, const float* k, int64_t row, int64_t dim, float scale,
                     float* scores, int64_t apart) {
    f32v sums[KEYS], part[KEYS];
    for (f32v& sum : sums) {
        sum = f32v{};  // "= {}" on the array becomes a slow rep stos in g++ 12
    }
    // In parts: one by one, the sums of 70 and more products were beyond the budget without an
    // fma.
    for (int64_t d = 0; d < dim;) {
        const int64_t end = dim - d < 32 ? dim : d + 32;
        for (f32v& sum : part) {
            sum = f32v{};
        }
        for (; d < end; ++d) {
            const f32v q = load(q_t + d * W);
            for (int j = 0; j < KEYS; ++j) {
                part[j] += q * k[j * row + d];
            }
        }
        for (int j = 0; j < KEYS; ++j) {
            sums[j] += part[j];
        }
    }
    for (int j = 0; j < KEYS; ++j) {
        store(sums[j] * scale, scores + j * apart);
    }
}

// The same for all frames as keys, and frames [first, first + W) of `q`, which q_t is filled with.
void products_of(const TemporalAttention& a, Rows q, int64_t first, Rows k, float scale,
                 float* q_t, float* scores, int64_t apart) {
    const int64_t rest = a.frames - first, queries = rest < W ? rest : W;
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
    for (; j + 8 <= a.frames; j += 8) {
        products<8>(q_t, k.data + j * k.row, k.row, a.dim, scale, scores + j * apart, apart);
    }
    for (; j + 4 <= a.frames; j += 4) {
        products<4>(q_t, k.data + j * k.row, k.row, a.dim, scale, scores + j * apart, apart);
    }
    for (; j < a.frames; ++j) {
        products<1>(q_t, k.data + j * k.row, k.row, a.dim, scale, scores + j * apart, apart);
    }
}

// Softmax over the keys of every column, in place.
inline void softmax(float* scores, int64_t keys, int64_t apart) {
    f32v most = load(scores);
    for (int64_t j = 1; j < keys; ++j) {
        most = max(most, load(scores + j * apart));
    }
    f32v total = {};
    for (int64_t j = 0; j < keys; ++j) {
        const f32v e = exp(load(scores + j * apart) - most);
        store(e, scores + j * apart);
        total += e;
    }
    const f32v share = splat(1.0f) / total;
    for (int64_t j = 0; j < keys; ++j) {
        store(load(scores + j * apart) * share, scores + j * apart);
    }
}

// QUERIES rows of the result, from `shares` of the keys: VECTORS vectors from column d on, or with
// TAIL the last `left` columns. Shares of one key lie `apart` from those of the next, or, TURNED,
// those of one query.
template <int QUERIES, int VECTORS, bool TAIL, bool TURNED, typename T>
inline void weighted(const float* shares, int64_t apart, const float* v, int64_t row, int64_t keys,
                     int left, T* out, int64_t out_row) {
    f32v sums[QUERIES * VECTORS];
    for (f32v& sum : sums) {
        sum = f32v{};
    }
    for (int64_t j = 0; j < keys; ++j) {
        for (int c = 0; c < VECTORS; ++c) {
            const f32v x = TAIL ? load(v + j * row, left) : load(v + j * row + c * W);
            for (int i = 0; i < QUERIES; ++i) {
                sums[i * VECTORS + c] += x * shares[TURNED ? i * apart + j : j * apart + i];
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

template <int QUERIES, bool TURNED, typename T>
void weighted_rows(const float* shares, int64_t apart, Rows v, int64_t keys, int64_t dim, T* out,
                   int64_t out_row) {
    int64_t d = 0;
    for (; d + 2 * W <= dim; d += 2 * W) {
        weighted<QUERIES, 2, false, TURNED>(shares, apart, v.data + d, v.row, keys, 0, out + d,
                                            out_row);
    }
    if (d + W <= dim) {
        weighted<QUERIES, 1, false, TURNED>(shares, apart, v.data + d, v.row, keys, 0, out + d,
                                            out_row);
        d += W;
    }
    if (d < dim) {
        const int left = static_cast<int>(dim - d);
        weighted<QUERIES, 1, true, TURNED>(shares, apart, v.data + d, v.row, keys, left, out + d,
                                           out_row);
    }
}

// `queries` rows of the result.
template <bool TURNED, typename T>
void all_weighted(const float* shares, int64_t apart, int64_t queries, Rows v, int64_t keys,
                  int64_t dim, T* out, int64_t out_row) {
    const int64_t next = TURNED ? apart : 1;
    int64_t i = 0;
    for (; i + 4 <= queries; i += 4) {
        weighted_rows<4, TURNED>(shares + i * next, apart, v, keys, dim, out + i * out_row,
                                 out_row);
    }
    for (; i < queries; ++i) {
        weighted_rows<1, TURNED>(shares + i * next, apart, v, keys, dim, out + i * out_row,
                                 out_row);
    }
}

// One head at one position; q_t [dim, W] and scores [frames, W] are scratch.
template <typename T>
void head(const TemporalAttention& a, Rows q, Rows k, Rows v, float* q_t, float* scores, T* out,
          int64_t out_row) {
    for (int64_t first = 0; first < a.frames; first += W) {
        const int64_t rest = a.frames - first;
        products_of(a, q, first, k, a.scale, q_t, scores, W);
        softmax(scores, a.frames, W);
        all_weighted<false>(scores, W, rest < W ? rest : W, v, a.frames, a.dim,
                            out + first * out_row, out_row);
    }
}

// The gradients of one head at one position: dq, dk and dv take the frame rows `out_row` apart.
// Scratch: q_t [dim, W]; shares and slopes [frames, apart], a row a key.
template <typename T>
void head_backward(const TemporalAttentionBackward& a, Rows grad, Rows q, Rows k, Rows v,
                   float* q_t, float* shares, float* slopes, int64_t out, int64_t out_row) {
    const int64_t frames = a.frames, apart = padded(frames, W);
    for (int64_t first = 0; first < frames; first += W) {
        products_of(a, q, first, k, a.scale, q_t, shares + first, apart);
        softmax(shares + first, frames, apart);
        products_of(a, grad, first, v, 1.0f, q_t, slopes + first, apart);
        f32v mean = {};
        for (int64_t j = 0; j < frames; ++j) {
            mean += load(shares + first + j * apart) * load(slopes + first + j * apart);
        }
        for (int64_t j = 0; j < frames; ++j) {
            float* slope = slopes + first + j * apart;
            store(load(shares + first + j * apart) * (load(slope) - mean) * a.scale, slope);
        }
    }
    T *dq = static_cast<T*>(a.out) + out, *dk = static_cast<T*>(a.dk) + out;
    T* dv = static_cast<T*>(a.dv) + out;
    all_weighted<false>(slopes, apart, frames, k, frames, a.dim, dq, out_row);
    all_weighted<true>(slopes, apart, frames, q, frames, a.dim, dk, out_row);
    all_weighted<true>(shares, apart, frames, grad, frames, a.dim, dv, out_row);
}

// A group of heads at one token position.
struct Task {
    int64_t b, n, h, heads;  // the first head, and how many

    Task(const TemporalAttention& a, int64_t task) : h(task % a.groups() * a.group) {
        const int64_t position = task / a.groups(), left = a.heads - h;
        n = position % a.tokens, b = position / a.tokens;
        heads = left < a.group ? left : a.group;
    }

    // Its frames of one tensor: IN_PLACE where they can be, or else in `to`.
    template <bool IN_PLACE, typename T>
    Rows read(const TemporalAttention& a, const TemporalAttention::View& x, float* to) const {
        const T* from = static_cast<const T*>(x.data) + b * x.batch + n * x.token + h * x.head;
        const Rows rows =
            IN_PLACE ? in_place(a, x, from, heads, to) : stage(a, x, from, heads, to);
        prefetch(a, x, from);
        return rows;
    }

    // Its first number in a contiguous result.
    int64_t out(const TemporalAttention& a) const {
        return ((b * a.frames * a.tokens + n) * a.heads + h) * a.dim;
    }
};

template <typename T>
void tasks(const TemporalAttention& a, int64_t begin, int64_t end, float* scratch) {
    const int64_t tensor = padded(a.frames, 4) * temporal::row_floats(a);
    float *q_to = scratch, *k_to = q_to + tensor, *v_to = k_to + tensor, *q_t = v_to + tensor;
    float* scores = q_t + padded(a.dim, 4) * temporal::MAX_WIDTH;
    // The frames and queries that fill the last vector are computed too, and must hold numbers.
    std::memset(scratch, 0, a.scratch_floats() * sizeof(float));
    for (int64_t i = begin; i < end; ++i) {
        const Task task(a, i);
        const Rows k = task.read<false, T>(a, a.k, k_to);
        const Rows q = task.read<true, T>(a, a.q, q_to), v = task.read<true, T>(a, a.v, v_to);
        T* out = static_cast<T*>(a.out) + task.out(a);
        for (int64_t at = 0; at < task.heads * a.dim; at += a.dim) {
            head(a, {q.data + at, q.row}, {k.data + at, k.row}, {v.data + at, v.row}, q_t, scores,
                 out + at, a.tokens * a.heads * a.dim);
        }
    }
}

template <typename T>
void tasks_backward(const TemporalAttentionBackward& a, int64_t begin, int64_t end,
                    float* scratch) {
    const int64_t tensor = padded(a.frames, 4) * temporal::row_floats(a);
    float *grad_to = scratch, *q_to = grad_to + tensor, *k_to = q_to + tensor;
    float *v_to = k_to + tensor, *q_t = v_to + tensor;
    float* shares = q_t + padded(a.dim, 4) * temporal::MAX_WIDTH;
    float* slopes = shares + a.frames * padded(a.frames, temporal::MAX_WIDTH);
    std::memset(scratch, 0, a.scratch_floats() * sizeof(float));  // as above
    for (int64_t i = begin; i < end; ++i) {
        const Task task(a, i);
        const Rows grad = task.read<false, T>(a, a.grad, grad_to);
        const Rows q = task.read<false, T>(a, a.q, q_to), k = task.read<false, T>(a, a.k, k_to);
        const Rows v = task.read<false, T>(a, a.v, v_to);
        for (int64_t at = 0; at < task.heads * a.dim; at += a.dim) {
            head_backward<T>(a, {grad.data + at, grad.row}, {q.data + at, q.row},
                             {k.data + at, k.row}, {v.data + at, v.row}, q_t, shares, slopes,
                             task.out(a) + at, a.tokens * a.heads * a.dim);
        }
    }
}

}  // namespace

void temporal_attention_backward(const TemporalAttentionBackward& a, int64_t begin, int64_t end,
                                 float* scratch) {
    switch_dtype(a.dtype, [&](auto* p) {
        tasks_backward<std::remove_pointer_t<decltype(p)>>(a, begin, end, scratch);
    });
}

void temporal_attention(const TemporalAttention& a, int64_t begin, int64_t end, float* scratch) {
    switch_dtype(a.dtype, [&](auto* p) {
        tasks<std::remove_pointer_t<decltype(p)>>(a, begin, end, scratch);
    });
}

}  // namespace tvk::TVK_LEVEL
