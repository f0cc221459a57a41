#pragma once

#include <cstdint>

#include "cpu/common/dtype.h"
#include "cpu/common/level.h"

namespace tvk {

struct TokenMapAttention {
    static constexpr int64_t TILE = 128;   // words at a time
    static constexpr int64_t LANES = 64;   // queries of the widest group
    static constexpr int64_t BLOCK = 256;  // queries that share a head's keys, at most

    DType dtype;
    const void* q;  // [B, F, N, H, D], strides in elements
    int64_t q_b, q_f, q_n, q_h, q_d;
    const void* k;  // [B, L, H, D]
    const void* v;
    int64_t k_b, k_l, k_h, k_d, v_b, v_l, v_h, v_d;
    void* out;              // contiguous
    void* maps;             // contiguous [B, F, N, words]
    const int64_t* chosen;  // [words], positions in the text
    int64_t batch, frames, tokens, heads, dim, length, words;
    float scale;
    int64_t block;  // a multiple of 16

    int64_t blocks() const { return (tokens + block - 1) / block; }
    int64_t tasks() const { return batch * frames * blocks(); }
    // Floats of one thread: the chosen words' maps; a group's queries, results and weights of all
    // words; a tile's keys and values.
    int64_t scratch() const {
        return words * block + LANES * (2 * dim + length + 8) + 2 * TILE * dim;
    }
};

// Tasks [begin, end) of a.tasks(): one block of queries of one frame, all heads.
TVK_KERNEL(token_map_attention,
           (const TokenMapAttention& a, float* scratch, int64_t begin, int64_t end));

}  // namespace tvk
