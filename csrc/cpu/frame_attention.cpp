#include "cpu/kernels/frame_attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/common/scratch.h"
#include "cpu/common/tensor.h"
#include "cpu/ops.h"

namespace tvk {
namespace {

using A = FrameAttention;

Axes axes(const Tensor& x) {
    return {x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4)};
}

const int32_t* table(const Tensor& x, const char* what) {
    STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Int, what, " is int32 on a CPU");
    STD_TORCH_CHECK(x.is_contiguous(), what, " is contiguous");
    return static_cast<const int32_t*>(x.const_data_ptr());
}

// Checks the rows of the table; marks the frames that are read at each coarse level.
std::vector<uint8_t> read_table(const A& a, int64_t count) {
    std::vector<uint8_t> wanted(A::MAX_LEVELS * a.frames, 0);
    for (int64_t f = 0; f < a.frames_q; ++f) {
        const int64_t first = a.row_ptr[f], last = a.row_ptr[f + 1];
        STD_TORCH_CHECK(0 <= first && first < last && last <= count, "row_ptr names no segments");
        for (int64_t s = first; s < last; ++s) {
            const int32_t* segment = a.segments + 4 * s;
            const int64_t frame = segment[0], level = segment[1];
            STD_TORCH_CHECK(0 <= frame && frame < a.frames && segment[2] >= 1,
                            "a segment names no frame");
            if (level != 0) {
                const int slot = a.slot(segment);
                STD_TORCH_CHECK(level > 1 && a.coarse[slot].level == level, "a level is missing");
                wanted[slot * a.frames + frame] = 1;
            }
        }
    }
    return wanted;
}

// log of the tokens in every cell.
std::vector<float> size_bias(int64_t h, int64_t w, int64_t level) {
    std::vector<float> found;
    for (int64_t y = 0; y < h; y += level) {
        for (int64_t x = 0; x < w; x += level) {
            const int64_t size = std::min(level, h - y) * std::min(level, w - x);
            found.push_back(std::log(static_cast<float>(size)));
        }
    }
    return found;
}

// Queries that share the tiles they read: many, but with work for every thread.
int64_t block_size(const A& a, int64_t threads) {
    int64_t blocks = (a.tokens + A::BLOCK - 1) / A::BLOCK;
    while (a.batch * a.heads * a.frames_q * blocks < 4 * threads && a.tokens / blocks > A::LANES) {
        blocks *= 2;
    }
    const int64_t each = (a.tokens + blocks - 1) / blocks;
    return (each + 15) / 16 * 16;
}

// What a call points to and no argument owns.
struct Held {
    std::vector<uint8_t> wanted;
    std::vector<Tensor> pooled;
    std::vector<float> bias[A::MAX_LEVELS];
};

void check_shapes(const Tensor& q, const Tensor& k, const Tensor& v) {
    check_like(k, q, "k");
    check_like(v, q, "v");
    STD_TORCH_CHECK(q.dim() == 5 && k.dim() == 5 && v.dim() == 5, "q, k, v are [B, F, N, H, D]");
    for (int64_t d = 0; d < 5; ++d) {
        STD_TORCH_CHECK(k.size(d) == v.size(d) && (d == 1 || q.size(d) == k.size(d)),
                        "q, k and v do not fit");
    }
}

// The arguments, checked, and the averages of every frame that is read coarsely.
void prepare(A& a, Held& held, const Tensor& q, const Tensor& k, const Tensor& v,
             const Tensor& row_ptr, const Tensor& segments, const std::vector<int64_t>& levels,
             int64_t h, int64_t w, std::optional<double> scale) {
    a.dtype = dtype_of(q);
    a.batch = q.size(0), a.frames_q = q.size(1), a.tokens = q.size(2);
    a.heads = q.size(3), a.dim = q.size(4), a.frames = k.size(1);
    a.h = h, a.w = w;
    a.q = q.const_data_ptr(), a.k = k.const_data_ptr(), a.v = v.const_data_ptr();
    a.q_by = axes(q), a.k_by = axes(k), a.v_by = axes(v);
    a.scale = static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(a.dim))));
    a.row_ptr = table(row_ptr, "row_ptr");
    a.segments = table(segments, "segments");
    STD_TORCH_CHECK(row_ptr.numel() == a.frames_q + 1, "row_ptr is [frames + 1]");
    STD_TORCH_CHECK(segments.dim() == 2 && segments.size(1) == 4, "segments is [S, 4]");
    STD_TORCH_CHECK(levels.size() == A::MAX_LEVELS, "levels are two");
    for (int slot = 0; slot < A::MAX_LEVELS; ++slot) {
        a.coarse[slot].level = levels[slot];
    }
    held.wanted = read_table(a, segments.size(0));
    a.wanted = held.wanted.data();

    const auto pool = best_frame_attention_pool();
    for (int slot = 0; slot < A::MAX_LEVELS; ++slot) {
        auto& coarse = a.coarse[slot];
        if (coarse.level == 0) {
            continue;
        }
        STD_TORCH_CHECK(h * w == a.tokens, "the grid does not hold a frame's tokens");
        const int64_t high = (h + coarse.level - 1) / coarse.level;
        coarse.cells = high * ((w + coarse.level - 1) / coarse.level);
        held.bias[slot] = size_bias(h, w, coarse.level);
        coarse.size_bias = held.bias[slot].data();
        const std::vector<int64_t> shape = {2, a.batch, a.frames, a.heads, coarse.cells, a.dim};
        held.pooled.push_back(torch::stable::new_empty(q, shape, ScalarType::Float));
        coarse.k = static_cast<float*>(held.pooled.back().mutable_data_ptr());
        coarse.v = coarse.k + held.pooled.back().numel() / 2;
        parallel_for(0, a.batch * a.frames * high, 1,
                     [&](int64_t begin, int64_t end) { pool(a, slot, begin, end); });
    }
}

// Keys of the query frame that reads most.
int64_t longest_row(const A& a) {
    int64_t longest = 0;
    for (int64_t f = 0; f < a.frames_q; ++f) {
        int64_t keys = 0;
        for (int32_t s = a.row_ptr[f]; s < a.row_ptr[f + 1]; ++s) {
            keys += a.cells(a.slot(a.segments + 4 * s));
        }
        longest = std::max(longest, keys);
    }
    return longest;
}

}  // namespace

std::tuple<Tensor, Tensor> frame_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const Tensor& row_ptr, const Tensor& segments,
                                           std::vector<int64_t> levels, int64_t h, int64_t w,
                                           std::optional<double> scale, bool return_lse) {
    check_shapes(q, k, v);
    Tensor out = empty_contiguous_like(q);
    std::vector<int64_t> rows = {0};
    if (return_lse) {
        rows = {q.size(0), q.size(1), q.size(2), q.size(3)};
    }
    Tensor lse = torch::stable::new_empty(q, rows, ScalarType::Float);
    if (out.numel() == 0) {
        return {out, lse};
    }
    A a = {};
    Held held;
    prepare(a, held, q, k, v, row_ptr, segments, levels, h, w, scale);
    a.out = out.mutable_data_ptr();
    a.lse = return_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;
    a.block = block_size(a, torch::stable::get_num_threads());
    const auto run = best_frame_attention();
    parallel_for(0, a.tasks(), 1, [&](int64_t begin, int64_t end) {
        run(a, Scratch(a.scratch()).data(), begin, end);
    });
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> frame_attention_backward(
    const Tensor& grad, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& row_ptr, const Tensor& segments, std::vector<int64_t> levels,
    int64_t h, int64_t w, std::optional<double> scale) {
    check_shapes(q, k, v);
    check_same(grad, q, "grad");
    Tensor dq = empty_contiguous_like(q), dk = empty_contiguous_like(k);
    Tensor dv = empty_contiguous_like(v);
    if (dq.numel() == 0) {  // no queries: keys may be there
        return {dq, torch::stable::zero_(dk), torch::stable::zero_(dv)};
    }
    FrameAttentionBackward a = {};
    Held held;
    prepare(a, held, q, k, v, row_ptr, segments, levels, h, w, scale);
    a.out = dq.mutable_data_ptr(), a.dk = dk.mutable_data_ptr(), a.dv = dv.mutable_data_ptr();
    a.grad = grad.const_data_ptr(), a.grad_by = axes(grad);
    if (grad_lse.has_value()) {
        const Tensor& lse = *grad_lse;
        STD_TORCH_CHECK(lse.is_cpu() && lse.scalar_type() == ScalarType::Float,
                        "grad_lse is float32 on a CPU");
        STD_TORCH_CHECK(lse.dim() == 4, "grad_lse is [B, F, N, H]");
        for (int64_t d = 0; d < 4; ++d) {
            STD_TORCH_CHECK(lse.size(d) == q.size(d), "grad_lse and q do not fit");
        }
        a.grad_lse = static_cast<const float*>(lse.const_data_ptr());
        a.grad_lse_by = {lse.stride(0), lse.stride(1), lse.stride(2), lse.stride(3), 0};
    }
    a.longest = longest_row(a);
    const int64_t vector = width(level());
    a.wide = (a.dim + vector - 1) / vector * vector;
    const int64_t heads = a.batch * a.heads;
    a.parts = std::min(a.frames_q, (a.TASKS + heads - 1) / heads);
    const std::vector<int64_t> shape = {a.parted(), 2, a.rows(), a.wide};
    Tensor sums = torch::stable::new_zeros(q, shape, ScalarType::Float);
    a.sums = static_cast<float*>(sums.mutable_data_ptr());
    const auto run = best_frame_attention_backward();
    parallel_for(0, a.parted(), 1, [&](int64_t begin, int64_t end) {
        run(a, Scratch(a.scratch()).data(), begin, end);
    });
    const auto collect = best_frame_attention_collect();
    parallel_for(0, a.batch * a.frames * a.tokens, 64, [&](int64_t begin, int64_t end) {
        collect(a, Scratch(a.wide).data(), begin, end);
    });
    return {dq, dk, dv};
}

}  // namespace tvk
