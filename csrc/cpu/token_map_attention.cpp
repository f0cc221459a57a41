#include "cpu/kernels/token_map_attention.h"

#include <algorithm>
#include <cmath>

#include "cpu/common/scratch.h"
#include "cpu/common/tensor.h"
#include "cpu/ops.h"

namespace tvk {

std::tuple<Tensor, Tensor> token_map_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                               const Tensor& tokens, std::optional<double> scale) {
    using A = TokenMapAttention;
    check_like(k, q, "k");
    check_like(v, q, "v");
    STD_TORCH_CHECK(q.dim() == 5 && k.dim() == 4 && v.dim() == 4,
                    "q is [B, F, N, H, D], k and v are [B, L, H, D]");
    for (int64_t d = 0; d < 4; ++d) {
        STD_TORCH_CHECK(k.size(d) == v.size(d) && (d == 1 || k.size(d) == q.size(d ? d + 1 : 0)),
                        "q, k and v do not fit");
    }
    STD_TORCH_CHECK(tokens.is_cpu() && tokens.scalar_type() == ScalarType::Long &&
                        tokens.dim() == 1 && tokens.is_contiguous(),
                    "tokens is a contiguous int64 [T] on a CPU");
    A a = {};
    a.dtype = dtype_of(q);
    a.batch = q.size(0), a.frames = q.size(1), a.tokens = q.size(2);
    a.heads = q.size(3), a.dim = q.size(4);
    a.length = k.size(1), a.words = tokens.size(0);
    STD_TORCH_CHECK(a.length > 0, "the text holds no tokens");
    a.chosen = static_cast<const int64_t*>(tokens.const_data_ptr());
    for (int64_t t = 0; t < a.words; ++t) {
        STD_TORCH_CHECK(0 <= a.chosen[t] && a.chosen[t] < a.length, "a token outside the text");
    }
    Tensor out = empty_contiguous_like(q);
    Tensor maps = torch::stable::new_empty(q, {a.batch, a.frames, a.tokens, a.words});
    if (out.numel() == 0) {
        return {out, torch::stable::zero_(maps)};
    }
    a.q = q.const_data_ptr(), a.k = k.const_data_ptr(), a.v = v.const_data_ptr();
    a.q_b = q.stride(0), a.q_f = q.stride(1), a.q_n = q.stride(2);
    a.q_h = q.stride(3), a.q_d = q.stride(4);
    a.k_b = k.stride(0), a.k_l = k.stride(1), a.k_h = k.stride(2), a.k_d = k.stride(3);
    a.v_b = v.stride(0), a.v_l = v.stride(1), a.v_h = v.stride(2), a.v_d = v.stride(3);
    a.out = out.mutable_data_ptr();
    a.maps = maps.mutable_data_ptr();
    a.scale = static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(a.dim))));
    // Many queries share a head's keys, but every thread has work.
    const int64_t threads = torch::stable::get_num_threads();
    int64_t blocks = (a.tokens + A::BLOCK - 1) / A::BLOCK;
    while (a.batch * a.frames * blocks < 4 * threads && a.tokens / blocks > A::LANES) {
        blocks *= 2;
    }
    a.block = ((a.tokens + blocks - 1) / blocks + 15) / 16 * 16;
    const auto run = best_token_map_attention();
    parallel_for(0, a.tasks(), 1, [&](int64_t begin, int64_t end) {
        run(a, Scratch(a.scratch()).data(), begin, end);
    });
    return {out, maps};
}

}  // namespace tvk
