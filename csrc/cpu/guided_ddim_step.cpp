#include "cpu/kernels/guided_ddim_step.h"

#include <cmath>

#include "cpu/common/tensor.h"
#include "cpu/ops.h"

namespace tvk {
namespace {

// Stride of a mask along dimension d of the shape that it broadcasts to.
int64_t broadcast_stride(const Tensor& mask, int64_t d, const Tensor& sample) {
    const int64_t own = d - (sample.dim() - mask.dim());
    if (own < 0 || mask.size(own) == 1) {
        return 0;
    }
    STD_TORCH_CHECK(mask.size(own) == sample.size(d), "mask does not fit sample");
    return mask.stride(own);
}

MaskType mask_type(const Tensor& mask, const Tensor& sample) {
    if (mask.scalar_type() == ScalarType::Bool) {
        return MaskType::boolean;
    }
    if (mask.scalar_type() == ScalarType::Float) {
        return MaskType::f32;
    }
    check_like(mask, sample, "mask");
    return MaskType::same;
}

}  // namespace

Tensor guided_ddim_step(const Tensor& sample, const Tensor& noise, const Tensor& step,
                        const std::optional<Tensor>& mask,
                        const std::optional<Tensor>& background) {
    check_like(noise, sample, "noise");
    STD_TORCH_CHECK(step.is_cpu() && step.dim() == 1 && step.size(0) == 3, "step is [3]");
    STD_TORCH_CHECK(step.scalar_type() == ScalarType::Float, "step is float32");
    STD_TORCH_CHECK(mask.has_value() == background.has_value(), "mask comes with background");
    const int64_t dims = sample.dim(), batch = sample.size(0);
    const bool guided = noise.size(0) != batch;
    STD_TORCH_CHECK(noise.dim() == dims && noise.size(0) == (guided ? 2 : 1) * batch,
                    "noise does not fit sample");

    Tensor out = empty_contiguous_like(sample);
    if (out.numel() == 0) {
        return out;
    }
    using G = GuidedStep;
    G a = {};
    a.dtype = dtype_of(sample);
    const float* numbers = static_cast<const float*>(step.const_data_ptr());
    const double alpha = numbers[0], target = numbers[step.stride(0)];
    const double keep = std::sqrt(target / alpha);
    a.keep = static_cast<float>(keep);
    a.add = static_cast<float>(std::sqrt(1 - target) - keep * std::sqrt(1 - alpha));
    a.guidance = numbers[2 * step.stride(0)];
    a.out = out.mutable_data_ptr();
    a.sample = sample.const_data_ptr();
    a.noise = noise.const_data_ptr();
    if (guided) {
        a.conditional = static_cast<const char*>(a.noise) +
                        batch * noise.stride(0) * static_cast<int64_t>(noise.element_size());
    }
    if (mask.has_value()) {
        check_like(*background, sample, "background");
        STD_TORCH_CHECK(background->dim() == dims && mask->is_cpu() && mask->dim() <= dims,
                        "mask or background do not fit sample");
        a.mask_type = mask_type(*mask, sample);
        a.mask = mask->const_data_ptr();
        a.background = background->const_data_ptr();
    }
    for (int64_t d = 0; d < dims; ++d) {
        STD_TORCH_CHECK(d == 0 || noise.size(d) == sample.size(d), "noise does not fit sample");
        int64_t strides[G::OPERANDS] = {out.stride(d), sample.stride(d), noise.stride(d), 0, 0};
        if (mask.has_value()) {
            strides[G::MASK] = broadcast_stride(*mask, d, sample);
            STD_TORCH_CHECK(background->size(d) == sample.size(d), "background does not fit");
            strides[G::BACKGROUND] = background->stride(d);
        }
        STD_TORCH_CHECK(a.over.push(sample.size(d), strides), "more than 8 strided dimensions");
    }
    const auto run = best_guided_ddim_step();
    // 64 blocks are about 20 us of work; fewer are not worth waking another thread.
    parallel_for(0, a.over.rows() * a.blocks_per_row(), 64,
                 [&](int64_t begin, int64_t end) { run(a, begin, end); });
    return out;
}

}  // namespace tvk
