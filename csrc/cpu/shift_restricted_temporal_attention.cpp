#include "cpu/kernels/shift_restricted_temporal_attention.h"

#include <algorithm>

#include "cpu/common/blas.h"
#include "cpu/common/tensor.h"
#include "cpu/ops.h"

namespace tvk {
namespace {

// Positions that are taken together: so many rows that the products run at their full rate, so few
// that all steps find them in caches. On one core, float32, 2048 rows against 65536 (all at once):
// 459 ms against 569 at 64 x 64 x 320, 8 frames; against 512 rows, 317 and 336 at 16 x 16 x 1280.
int64_t chunk_of(const Tensor& z) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t rows = std::max<int64_t>(2048, 1024 * threads);
    const int64_t most = (rows + z.size(1) - 1) / z.size(1);
    const int64_t chunks = (z.size(2) + most - 1) / most;
    return (z.size(2) + chunks - 1) / chunks;
}

void check_weight(const Tensor& weight, const Tensor& z, const char* what) {
    check_like(weight, z, what);
    STD_TORCH_CHECK(
        weight.dim() == 2 && weight.size(0) == z.size(3) && weight.size(1) == z.size(3), what,
        " is [C, C]");
}

}  // namespace

Tensor shift_restricted_temporal_attention(const Tensor& z, const Tensor& w_q, const Tensor& w_k,
                                           const Tensor& w_v, const Tensor& w_out,
                                           const std::optional<Tensor>& bias, int64_t heads) {
    STD_TORCH_CHECK(z.is_cpu() && z.dim() == 4, "z is [B, F, N, C] on a CPU");
    const int64_t batch = z.size(0), frames = z.size(1), tokens = z.size(2), c = z.size(3);
    STD_TORCH_CHECK(heads > 0 && c % heads == 0, "heads do not divide the channels");
    const Tensor* weights[] = {&w_q, &w_k, &w_v, &w_out};
    const char* names[] = {"w_q", "w_k", "w_v", "w_out"};
    for (int i = 0; i < 4; ++i) {
        check_weight(*weights[i], z, names[i]);
    }
    if (bias.has_value()) {
        check_like(*bias, z, "bias");
        STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == c, "bias is [C]");
    }
    Tensor out = empty_contiguous_like(z);
    if (out.numel() == 0) {
        return out;
    }
    Stam a = {};
    a.dtype = dtype_of(z);
    a.frames = frames, a.channels = c;
    a.z_f = z.stride(1), a.z_n = z.stride(2), a.z_c = z.stride(3);
    a.out_f = tokens * c;
    std::optional<Tensor> dense_bias;
    if (bias.has_value()) {
        dense_bias = torch::stable::contiguous(*bias);
        a.bias = dense_bias->const_data_ptr();
    }
    const int64_t chunk = chunk_of(z), chunks = (tokens + chunk - 1) / chunk;
    const int64_t size = z.element_size();
    // Centered rows, which the attended ones replace after their projection; queries, keys,
    // values.
    const Tensor buffers = torch::stable::new_empty(z, {4, frames * chunk * c});
    char* memory = static_cast<char*>(buffers.mutable_data_ptr());
    const auto center = best_stam_center(), add = best_stam_add();
    const int64_t grain = std::max<int64_t>(1, 32768 / (frames * c));
    for (int64_t task = 0; task < batch * chunks; ++task) {
        const int64_t b = task / chunks, first = task % chunks * chunk;
        a.tokens = std::min(chunk, tokens - first);
        a.z = static_cast<const char*>(z.const_data_ptr()) +
              (b * z.stride(0) + first * z.stride(2)) * size;
        a.out =
            static_cast<char*>(out.mutable_data_ptr()) + (b * frames * tokens + first) * c * size;
        a.rows = memory;
        parallel_for(0, a.tokens, grain,
                     [&](int64_t begin, int64_t end) { center(a, begin, end); });
        const int64_t rows = frames * a.tokens;
        const Tensor x = matrix(memory, rows, c, z.scalar_type());
        Tensor heads_of[3];
        for (int i = 0; i < 3; ++i) {
            const Tensor y = matrix(memory + (i + 1) * rows * c * size, rows, c, z.scalar_type());
            matmul(x, transposed(*weights[i]), y);
            heads_of[i] = torch::stable::view(y, {1, frames, a.tokens, heads, c / heads});
        }
        const Tensor attended =
            temporal_attention(heads_of[0], heads_of[1], heads_of[2], std::nullopt);
        matmul(torch::stable::view(attended, {rows, c}), transposed(w_out), x);
        parallel_for(0, a.tokens, grain, [&](int64_t begin, int64_t end) { add(a, begin, end); });
    }
    return out;
}

}  // namespace tvk
