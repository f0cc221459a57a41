// The arithmetic of attention over tiles of keys: products, online softmax, all in registers and
// in caches. Only for files in cpu/kernels; knows no torch.
//
// Queries lie in the lanes of vectors, so that maxima and sums over keys are lane by lane, and
// keys and values are read where they are, number by number, by broadcast: none is transposed,
// packed or gathered. The products are written out because both operands of a BLAS call would go
// through memory and be packed again for every tile: on one core of an EPYC 9004 (AVX-512,
// float32, 4096 keys) this file reaches 87 GFLOP/s at head dim 40, exponentials included, where
// the two sgemm of MKL alone, tiles of 256 x 512, reach 78; at head dim 160, 98 against 94; at
// head dim 8, 57 against 23.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/common/vec.h"

namespace tvk::TVK_LEVEL {
namespace {

// Vectors of queries that one product takes at a time: VECTORS x 4 sums, VECTORS queries and one
// broadcast fit in 32 registers of AVX-512 or 16 of the others.
constexpr int VECTORS = W == 16 ? 4 : 3;
constexpr int TILE = 128;  // keys at a time: their weights for one group, 32 KiB, stay near

// Rows of keys, or columns of values, that one product takes at a time. A single vector of queries
// needs more of them to have enough sums under way.
template <int V>
constexpr int ROWS = V == 1 ? 8 : 4;

// e^x for x <= 0, within 1 ulp; e^-86 below that, so that -inf counts for nothing. NaN stays NaN.
// Half of vec.h's exp, which serves every x. Base 2 with log2(e) folded into the queries would
// save one product more, but that constant's rounding, times a large score, is an error that e^x
// has not.
inline f32v exp_below(f32v x) {
    x = x < -86.0f ? splat(-86.0f) : x;
    const f32v magic = splat(0x1.8p23f);  // adding it rounds to the nearest integer
    const f32v shifted = x * 1.44269504f + magic;
    const f32v n = shifted - magic;
    const f32v r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    // Minimax of the relative error for |r| <= ln 2 / 2: 4e-9.
    f32v p = splat(1.381461392e-3f);
    p = p * r + 8.368710056e-3f;
    p = p * r + 4.166838899e-2f;
    p = p * r + 1.666652113e-1f;
    p = p * r + 4.999999404e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const f32v found = as<f32v>(as<i32v>(p) + (as<i32v>(shifted) << 23));
    return p == p ? found : p;  // a NaN's bits would reach the exponent
}

// to[j][i] = from[i][j] for 4 x 4 floats.
inline void transpose4(const float* const (&from)[4], float* const (&to)[4]) {
#if TVK_X86
    __m128 x0 = _mm_loadu_ps(from[0]), x1 = _mm_loadu_ps(from[1]);
    __m128 x2 = _mm_loadu_ps(from[2]), x3 = _mm_loadu_ps(from[3]);
    _MM_TRANSPOSE4_PS(x0, x1, x2, x3);
    _mm_storeu_ps(to[0], x0);
    _mm_storeu_ps(to[1], x1);
    _mm_storeu_ps(to[2], x2);
    _mm_storeu_ps(to[3], x3);
#else
    for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) {
            to[j][i] = from[i][j];
        }
    }
#endif
}

// A row of `dim` numbers as dense floats: where it is, or copied to `staged`.
template <typename T>
const float* dense(const T* p, int64_t by, int64_t dim, float* staged) {
    if constexpr (sizeof(T) == sizeof(float)) {
        if (by == 1) {
            return p;
        }
    }
    int64_t d = 0;
    for (; by == 1 && d + W <= dim; d += W) {
        store(load(p + d), staged + d);
    }
    for (; d < dim; ++d) {
        staged[d] = widen(p[d * by]);
    }
    return staged;
}

// Queries into lanes: to[d * lanes + i] = number d of query i, `lanes` a multiple of 4.
// Lanes beyond the last query repeat it. `staged` holds four rows.
template <typename T>
void pack(const T* q, int64_t by_query, int64_t by_dim, int64_t queries, int64_t dim,
          int64_t lanes, float* staged, float* to) {
    for (int64_t i = 0; i < lanes; i += 4) {
        const float* rows[4];
        for (int64_t j = 0; j < 4; ++j) {
            const int64_t query = i + j < queries ? i + j : queries - 1;
            rows[j] = dense(q + query * by_query, by_dim, dim, staged + j * dim);
        }
        float* column = to + i;
        int64_t d = 0;
        for (; d + 4 <= dim; d += 4, column += 4 * lanes) {
            transpose4({rows[0] + d, rows[1] + d, rows[2] + d, rows[3] + d},
                       {column, column + lanes, column + 2 * lanes, column + 3 * lanes});
        }
        for (; d < dim; ++d, column += lanes) {
            for (int64_t j = 0; j < 4; ++j) {
                column[j] = rows[j][d];
            }
        }
    }
}

// Lanes back to rows: number d of query i = from[d * lanes + i]. `staged` holds four rows.
template <typename T>
void unpack(const float* from, int64_t lanes, int64_t queries, int64_t dim, float* staged, T* out,
            int64_t by_query) {
    for (int64_t i = 0; i < queries; i += 4) {
        float* rows[4];
        for (int64_t j = 0; j < 4; ++j) {
            rows[j] = staged + j * dim;
            if constexpr (sizeof(T) == sizeof(float)) {
                if (i + j < queries) {
                    rows[j] = out + (i + j) * by_query;
                }
            }
        }
        const float* column = from + i;
        int64_t d = 0;
        for (; d + 4 <= dim; d += 4, column += 4 * lanes) {
            transpose4({column, column + lanes, column + 2 * lanes, column + 3 * lanes},
                       {rows[0] + d, rows[1] + d, rows[2] + d, rows[3] + d});
        }
        for (; d < dim; ++d, column += lanes) {
            for (int64_t j = 0; j < 4; ++j) {
                rows[j][d] = column[j];
            }
        }
        if constexpr (sizeof(T) != sizeof(float)) {
            for (int64_t j = 0; j < 4 && i + j < queries; ++j) {
                T* row = out + (i + j) * by_query;
                for (d = 0; d + W <= dim; d += W) {
                    store(load(rows[j] + d), row + d);
                }
                for (; d < dim; ++d) {
                    narrow(rows[j][d], row + d);
                }
            }
        }
    }
}

// Keys and values of one tile, row by row wherever they are: float, columns dense.
struct Tile {
    const float* keys[TILE];
    const float* values[TILE];
    float scale, bias[TILE];  // of the scores
    int size = 0;

    // `count` dense rows, as keys and as values.
    void point(const float* rows, int64_t dim, int count) {
        for (size = 0; size < count; ++size) {
            keys[size] = values[size] = rows + size * dim;
        }
    }

    // Repeats the last row where a product would read on.
    void seal() {
        for (int n = size; n % 8 != 0; ++n) {
            keys[n] = keys[size - 1];
            bias[n] = bias[size - 1];
        }
    }
};

// A block of queries as vectors, in groups of up to VECTORS of about one size. Each group has its
// own [dim][lanes] of queries and of results, so that what one product reads lies together.
struct Groups {
    int64_t vectors, count;

    explicit Groups(int64_t queries, int64_t most = VECTORS)
        : vectors((queries + W - 1) / W), count((vectors + most - 1) / most) {}

    // The first vector of a group, and how many it has.
    int64_t first(int64_t group) const { return group * vectors / count; }
    int64_t size(int64_t group) const { return first(group + 1) - first(group); }
};

// p[n][V * W] = keys[n] . q * scale + bias[n], q being [dim][V * W]; `highest` takes part in the
// maxima. A query scaled beforehand would round each of its products, which missed the budget.
template <int V>
void score(const Tile& tile, const float* q, int dim, float* p, f32v* highest) {
    constexpr int R = ROWS<V>;
    f32v most[V];
    for (int j = 0; j < V; ++j) {
        most[j] = highest[j];
    }
    for (int n = 0; n < tile.size; n += R) {
        const float* const* rows = tile.keys + n;
        f32v sums[R][V];
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) {
                sums[i][j] = f32v{};
            }
        }
        for (int d = 0; d < dim; ++d) {
            f32v query[V];
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) {
                query[j] = load(q + (d * V + j) * W);
            }
#pragma GCC unroll 8
            for (int i = 0; i < R; ++i) {
                const f32v key = splat(rows[i][d]);
#pragma GCC unroll 4
                for (int j = 0; j < V; ++j) {
                    sums[i][j] += key * query[j];
                }
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) {
                const f32v found = sums[i][j] * tile.scale + tile.bias[n + i];
                store(found, p + ((n + i) * V + j) * W);
                most[j] = max(most[j], found);
            }
        }
    }
    for (int j = 0; j < V; ++j) {
        highest[j] = most[j];
    }
}

// Scores to weights, e^(p - highest), and their sums. Added one by one, many small weights would
// be lost beside a large one, so they are added in trees of 8 and these in runs of 4.
template <int V>
void exponentiate(int size, float* p, const f32v* highest, f32v* sums) {
    f32v top[V], sum[V], run[V];
    for (int j = 0; j < V; ++j) {
        top[j] = highest[j];
        sum[j] = run[j] = f32v{};
    }
    const auto weight = [&](int n, int j) {
        float* at = p + (n * V + j) * W;
        const f32v found = exp_below(load(at) - top[j]);
        store(found, at);
        return found;
    };
    int n = 0;
    for (; n + 8 <= size; n += 8) {
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) {
            const f32v low =
                (weight(n, j) + weight(n + 1, j)) + (weight(n + 2, j) + weight(n + 3, j));
            const f32v high =
                (weight(n + 4, j) + weight(n + 5, j)) + (weight(n + 6, j) + weight(n + 7, j));
            run[j] += low + high;
        }
        if (n % 32 == 24) {
            for (int j = 0; j < V; ++j) {
                sum[j] += run[j];
                run[j] = f32v{};
            }
        }
    }
    for (int j = 0; j < V; ++j) {
        f32v rest = {};
        for (int i = n; i < size; ++i) {
            rest += weight(i, j);
        }
        sums[j] = sum[j] + (run[j] + rest);
    }
}

// o[d][V * W] = o * keep + values^T p, for `dim` columns.
template <int V>
void weigh(const Tile& tile, const float* p, int dim, const f32v* keep, float* o) {
    constexpr int R = ROWS<V>;
    for (int d = 0; d < dim; d += R) {
        int column[R];  // beyond the last the last again, computed and dropped
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            column[i] = d + i < dim ? d + i : dim - 1;
        }
        f32v sums[R][V] = {};
        for (int n = 0; n < tile.size; ++n) {
            const float* row = tile.values[n];
            f32v weight[V];
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) {
                weight[j] = load(p + (n * V + j) * W);
            }
#pragma GCC unroll 8
            for (int i = 0; i < R; ++i) {
                const f32v value = splat(row[column[i]]);
#pragma GCC unroll 4
                for (int j = 0; j < V; ++j) {
                    sums[i][j] += value * weight[j];
                }
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            if (d + i >= dim) {
                break;
            }
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) {
                float* at = o + ((d + i) * V + j) * W;
                store(load(at) * keep[j] + sums[i][j], at);
            }
        }
    }
}

// Every row of `lanes` results times its vector of factors.
inline void multiply(float* o, int64_t lanes, int64_t dim, const f32v* factors) {
    for (int64_t d = 0; d < dim; ++d) {
        for (int64_t i = 0; i < lanes; i += W) {
            float* at = o + d * lanes + i;
            store(load(at) * factors[i / W], at);
        }
    }
}

}  // namespace
}  // namespace tvk::TVK_LEVEL
