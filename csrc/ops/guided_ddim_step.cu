#include "kernels/guided_ddim_step.cuh"
#include "ops/ops.h"
#include "ops/tensor.h"

namespace tvk {
namespace {

// Stride of x along dimension d of a shape of `dims` dimensions that x broadcasts to.
int64_t broadcast_stride(const Tensor& x, int64_t d, int64_t dims, int64_t size) {
    const int64_t own = d - (dims - x.dim());
    if (own < 0 || x.size(own) == 1) {
        return 0;
    }
    STD_TORCH_CHECK(x.size(own) == size, "mask does not fit sample");
    return x.stride(own);
}

}  // namespace

Tensor guided_ddim_step(const Tensor& sample, const Tensor& noise, const Tensor& step,
                        const std::optional<Tensor>& mask,
                        const std::optional<Tensor>& background) {
    using G = GuidedStep;
    const int64_t dims = sample.dim(), batch = sample.size(0);
    const bool guided = noise.size(0) != batch;
    check_beside(noise, sample, "noise");
    check_beside(step, sample, "step");
    STD_TORCH_CHECK(step.dim() == 1 && step.size(0) == 3, "step is [3]");
    STD_TORCH_CHECK(noise.dim() == dims && noise.size(0) == (guided ? 2 : 1) * batch,
                    "noise does not fit sample");
    STD_TORCH_CHECK(mask.has_value() == background.has_value(), "mask comes with background");

    Tensor out = torch::stable::new_empty(sample, sample.sizes());
    G p = {};
    p.size = checked_int(out.numel(), "the number of latents");
    if (p.size == 0) {
        return out;
    }
    const Tensor* operands[G::OPERANDS] = {&sample, &noise};
    if (mask.has_value()) {
        check_beside(*mask, sample, "mask");
        check_like(*background, sample, "background");
        STD_TORCH_CHECK(mask->dim() <= dims, "mask does not fit sample");
        operands[G::MASK] = &*mask;
        operands[G::BACKGROUND] = &*background;
    }
    for (int x = 0; x < G::OPERANDS; ++x) {
        if (operands[x] != nullptr) {
            p.data[x] = operands[x]->const_data_ptr();
            p.kind[x] = kind_of(*operands[x], "an input");
            STD_TORCH_CHECK(p.kind[x] != Kind::f64, "an input is float64");
        }
    }
    p.step = step.const_data_ptr();
    p.step_kind = kind_of(step, "step");
    STD_TORCH_CHECK(bytes_of(p.step_kind) >= 4, "step is float32 or float64");
    p.step_stride = step.stride(0);
    p.guided = guided;
    p.conditional = guided ? batch * noise.stride(0) : 0;
    p.out = out.mutable_data_ptr();
    for (int64_t d = 0; d < dims; ++d) {
        const int64_t size = sample.size(d);
        STD_TORCH_CHECK(d == 0 || noise.size(d) == size, "noise does not fit sample");
        int64_t strides[G::OPERANDS] = {sample.stride(d), noise.stride(d), 0, 0};
        if (mask.has_value()) {
            STD_TORCH_CHECK(background->dim() == dims && background->size(d) == size,
                            "background does not fit sample");
            strides[G::MASK] = broadcast_stride(*mask, d, dims, size);
            strides[G::BACKGROUND] = background->stride(d);
        }
        STD_TORCH_CHECK(p.over.push(size, strides), "more than 8 strided dimensions");
    }
    const OnDevice here(sample);
    const auto run = [&](auto zero) {
        return launch_guided_ddim_step<decltype(zero)>(p, here.stream());
    };
    check_launch(by_type(sample, run), "guided_ddim_step");
    return out;
}

}  // namespace tvk
