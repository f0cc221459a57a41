#include "cpu/kernels/guided_ddim_step.h"

#include <type_traits>

#include "cpu/common/vec.h"

namespace tvk::TVK_LEVEL {
namespace {

// n elements at p as a dense run: p itself, or a copy in the buffer where it is strided.
template <typename T>
const T* dense(const void* base, int64_t offset, int64_t stride, int64_t n, T* buffer) {
    const T* p = static_cast<const T*>(base) + offset;
    if (stride == 1) {
        return p;
    }
    for (int64_t i = 0; i < n; ++i) {
        buffer[i] = p[i * stride];
    }
    return buffer;
}

template <typename M>
void widen_mask(const void* base, int64_t offset, int64_t stride, int64_t n, float* buffer) {
    const M* p = static_cast<const M*>(base) + offset;
    for (int64_t i = 0; i < n; ++i) {
        if constexpr (sizeof(M) == 1) {
            buffer[i] = p[i * stride] ? 1.0f : 0.0f;
        } else {
            buffer[i] = widen(p[i * stride]);
        }
    }
}

template <typename T>
struct Run {
    T* out;
    const T* sample;
    const T* noise;
    const T* conditional;
    const float* mask;
    const T* background;
};

// Numbers i to i + n.
template <typename T, bool GUIDED, bool MASKED, typename N>
inline void step(const GuidedStep& a, const Run<T>& r, int64_t i, N n) {
    f32v eps = load(r.noise + i, n);
    if constexpr (GUIDED) {
        eps = (load(r.conditional + i, n) - eps) * a.guidance + eps;
    }
    f32v x = load(r.sample + i, n) * a.keep + eps * a.add;
    if constexpr (MASKED) {
        // From the nearer end: the background bit for bit where the mask is 0, x where it is 1.
        const f32v m = load(r.mask + i, n), b = load(r.background + i, n), d = x - b;
        x = m < 0.5f ? b + d * m : x - d * (1.0f - m);
    }
    store(x, r.out + i, n);
}

template <typename T, bool GUIDED, bool MASKED>
void run(const GuidedStep& a, const Run<T>& r, int64_t n) {
    each_vector(n, [&](int64_t i, auto some) { step<T, GUIDED, MASKED>(a, r, i, some); });
}

template <typename T>
void blocks(const GuidedStep& a, int64_t begin, int64_t end) {
    using G = GuidedStep;
    T buffers[4][G::BLOCK];
    float mask[G::BLOCK];
    const int64_t per_row = a.blocks_per_row();
    for (int64_t block = begin; block < end; ++block) {
        int64_t at[G::OPERANDS];
        a.over.offsets(block / per_row, at);
        const int64_t first = block % per_row * G::BLOCK;
        const int64_t left = a.over.inner() - first, n = left < G::BLOCK ? left : G::BLOCK;
        int64_t by[G::OPERANDS];
        for (int i = 0; i < G::OPERANDS; ++i) {
            by[i] = a.over.inner_stride(i);
            at[i] += first * by[i];
        }
        Run<T> r = {};
        r.out = static_cast<T*>(a.out) + at[G::OUT];
        r.sample = dense(a.sample, at[G::SAMPLE], by[G::SAMPLE], n, buffers[0]);
        r.noise = dense(a.noise, at[G::NOISE], by[G::NOISE], n, buffers[1]);
        const bool guided = a.conditional != nullptr, masked = a.mask_type != MaskType::none;
        if (guided) {
            r.conditional = dense(a.conditional, at[G::NOISE], by[G::NOISE], n, buffers[2]);
        }
        if (masked) {
            const int64_t m = at[G::MASK], m_by = by[G::MASK];
            r.background =
                dense(a.background, at[G::BACKGROUND], by[G::BACKGROUND], n, buffers[3]);
            r.mask = mask;
            if (a.mask_type == MaskType::boolean) {
                widen_mask<uint8_t>(a.mask, m, m_by, n, mask);
            } else if (a.mask_type == MaskType::f32) {
                widen_mask<float>(a.mask, m, m_by, n, mask);
            } else {
                widen_mask<T>(a.mask, m, m_by, n, mask);
            }
        }
        const auto go = guided ? (masked ? run<T, true, true> : run<T, true, false>)
                               : (masked ? run<T, false, true> : run<T, false, false>);
        go(a, r, n);
    }
}

}  // namespace

void guided_ddim_step(const GuidedStep& a, int64_t begin, int64_t end) {
    switch_dtype(a.dtype,
                 [&](auto* p) { blocks<std::remove_pointer_t<decltype(p)>>(a, begin, end); });
}

}  // namespace tvk::TVK_LEVEL
