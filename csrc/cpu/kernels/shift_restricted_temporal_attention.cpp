#include "cpu/kernels/shift_restricted_temporal_attention.h"

#include <type_traits>

#include "cpu/common/vec.h"

namespace tvk::TVK_LEVEL {
namespace {

// n numbers `by` apart.
template <typename T, typename N>
f32v at(const T* p, int64_t by, N n) {
    if (by == 1) {
        return load(p, n);
    }
    T found[W] = {};
    for (int i = 0; i < n; ++i) {
        found[i] = p[i * by];
    }
    return load(found);
}

template <typename T>
void center(const Stam& a, int64_t begin, int64_t end) {
    const float frames = static_cast<float>(a.frames);
    const int64_t frame = a.tokens * a.channels;
    for (int64_t n = begin; n < end; ++n) {
        const T* z = static_cast<const T*>(a.z) + n * a.z_n;
        T* rows = static_cast<T*>(a.rows) + n * a.channels;
        each_vector(a.channels, [&](int64_t c, auto many) {
            const T* p = z + c * a.z_c;
            f32v sum = {};
            for (int64_t f = 0; f < a.frames; ++f) {
                sum += at(p + f * a.z_f, a.z_c, many);
            }
            const f32v mean = sum / frames;
            for (int64_t f = 0; f < a.frames; ++f) {
                store(at(p + f * a.z_f, a.z_c, many) - mean, rows + f * frame + c, many);
            }
        });
    }
}

template <typename T>
void add(const Stam& a, int64_t begin, int64_t end) {
    const T* bias = static_cast<const T*>(a.bias);
    for (int64_t f = 0; f < a.frames; ++f) {
        for (int64_t n = begin; n < end; ++n) {
            const T* z = static_cast<const T*>(a.z) + f * a.z_f + n * a.z_n;
            const T* row = static_cast<const T*>(a.rows) + (f * a.tokens + n) * a.channels;
            T* out = static_cast<T*>(a.out) + f * a.out_f + n * a.channels;
            each_vector(a.channels, [&](int64_t c, auto many) {
                f32v x = load(row + c, many);
                x = bias != nullptr ? x + load(bias + c, many) : x;
                store(at(z + c * a.z_c, a.z_c, many) + x, out + c, many);
            });
        }
    }
}

}  // namespace

void stam_center(const Stam& a, int64_t begin, int64_t end) {
    switch_dtype(a.dtype,
                 [&](auto* p) { center<std::remove_pointer_t<decltype(p)>>(a, begin, end); });
}

void stam_add(const Stam& a, int64_t begin, int64_t end) {
    switch_dtype(a.dtype,
                 [&](auto* p) { add<std::remove_pointer_t<decltype(p)>>(a, begin, end); });
}

}  // namespace tvk::TVK_LEVEL
