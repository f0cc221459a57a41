// Vectors of float of this level's width, in GCC's vector extensions (g++ and clang): + - * / and
// comparisons are the compiler's own, a * b + c becomes an fma where the level has one. Loads and
// stores convert from and to the storage types. Only for files in cpu/kernels; knows no torch.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/common/dtype.h"
#include "cpu/common/level.h"

#ifndef TVK_LEVEL
#error "vec.h is for cpu/kernels, which are compiled with -DTVK_LEVEL=..."
#endif

#define TVK_JOIN(a, b) a##b
#define TVK_JOINED(a, b) TVK_JOIN(a, b)
#define TVK_WIDTH TVK_JOINED(TVK_WIDTH_, TVK_LEVEL)

// Intrinsics that take a whole vector, where the level's is one of theirs.
#if TVK_X86
#include <immintrin.h>
#if TVK_WIDTH == 16 && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define TVK_AVX512
#elif TVK_WIDTH == 8 && defined(__AVX2__) && defined(__F16C__)
#define TVK_AVX2
#endif
#endif

// A builder with TVK_CHECKED, or any with the address sanitizer, looks whether a count of numbers
// is one that a vector has: a masked load beyond its buffer can go unseen by the sanitizer, which
// knows no masks of intrinsics.
#if defined(TVK_CHECKED) || defined(__SANITIZE_ADDRESS__)
#define TVK_CHECK(holds, n)                                                                 \
    ((holds) ? void()                                                                       \
             : (std::fprintf(stderr, "%s:%d: %d numbers of a vector of %d: %s\n", __FILE__, \
                             __LINE__, n, W, #holds),                                       \
                std::abort()))
#else
#define TVK_CHECK(holds, n) void()
#endif

namespace tvk::TVK_LEVEL {
namespace {

constexpr int W = TVK_WIDTH;

typedef float f32v __attribute__((vector_size(4 * W)));
typedef int32_t i32v __attribute__((vector_size(4 * W)));
typedef uint32_t u32v __attribute__((vector_size(4 * W)));
typedef uint16_t u16v __attribute__((vector_size(2 * W)));

// Minus, not plus: 0 + -0 is not -0, so that a compiler would have to compute it.
inline f32v splat(float x) { return x - f32v{}; }

template <typename To, typename From>
inline To as(From x) {
    static_assert(sizeof(To) == sizeof(From), "one size");
    To result;
    std::memcpy(&result, &x, sizeof(To));
    return result;
}

inline f32v max(f32v a, f32v b) { return a > b ? a : b; }
inline f32v min(f32v a, f32v b) { return a < b ? a : b; }

template <typename T>
inline T read(const void* p) {
    T x;
    std::memcpy(&x, p, sizeof(T));
    return x;
}

// One number, widened or narrowed; to nearest even, NaN stays NaN.
inline float widen(float x) { return x; }
inline float widen(bf16 x) { return as<float>(uint32_t{x.bits} << 16); }
inline float widen(f16 x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    // The exponent is moved by a product, which also gives subnormals their value.
    const uint32_t sign = uint32_t{x.bits} << 16 & 0x80000000u;
    const uint32_t rest = uint32_t{x.bits} << 13 & 0x0fffe000u;
    const float scaled = as<float>(rest) * 0x1p112f;
    const uint32_t special = rest >= 0x0f800000u ? 0x7f800000u : 0;
    return as<float>(as<uint32_t>(scaled) | special | sign);
#endif
}

inline void narrow(float x, float* p) { *p = x; }
inline void narrow(float x, bf16* p) {
    const uint32_t bits = as<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    p->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}
inline void narrow(float x, f16* p) {
#if defined(__F16C__)
    p->bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
    const uint32_t bits = as<uint32_t>(x), sign = bits >> 16 & 0x8000u;
    const float size = as<float>(bits & 0x7fffffffu);
    uint32_t half;
    if (!(size < 65520.0f)) {
        half = size != size ? 0x7e00u : 0x7c00u;
    } else if (size < 0x1p-14f) {
        half = as<uint32_t>(size + 0.5f) - 0x3f000000u;  // the sum rounds to steps of 2^-24
    } else {
        const uint32_t b = as<uint32_t>(size);
        half = (b - 0x38000000u + 0xfffu + (b >> 13 & 1)) >> 13;
    }
    p->bits = static_cast<uint16_t>(half | sign);
#endif
}

inline f32v load(const float* p) { return read<f32v>(p); }
inline f32v load(const bf16* p) {
    return as<f32v>(__builtin_convertvector(read<u16v>(p), u32v) << 16);
}
inline f32v load(const f16* p) {
#if defined(TVK_AVX512)
    // The maskz forms: g++ 12 calls the plain ones' undefined source uninitialised.
    return as<f32v>(_mm512_maskz_cvtph_ps(0xffff, read<__m256i>(p)));
#elif defined(TVK_AVX2)
    return as<f32v>(_mm256_cvtph_ps(read<__m128i>(p)));
#else
    f32v x;
    for (int i = 0; i < W; ++i) {
        x[i] = widen(p[i]);
    }
    return x;
#endif
}

inline void store(f32v x, float* p) { std::memcpy(p, &x, sizeof(x)); }
inline void store(f32v x, bf16* p) {
    const u32v bits = as<u32v>(x);
    const u32v rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const u32v kept = x == x ? rounded : u32v{} + 0x7fc0u;
    const u16v half = __builtin_convertvector(kept, u16v);
    std::memcpy(p, &half, sizeof(half));
}
inline void store(f32v x, f16* p) {
#if defined(TVK_AVX512)
    const __m256i half = _mm512_maskz_cvtps_ph(0xffff, as<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &half, sizeof(half));
#elif defined(TVK_AVX2)
    const __m128i half = _mm256_cvtps_ph(as<__m256>(x), _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &half, sizeof(half));
#else
    for (int i = 0; i < W; ++i) {
        narrow(x[i], p + i);
    }
#endif
}

// All bits of the first n lanes.
inline i32v first_lanes(int n) {
    i32v lane = {};
    for (int i = 0; i < W; ++i) {
        lane[i] = i;
    }
    return lane < n;
}

// The first n numbers, 0 <= n <= W; the others are zero, and their memory is not touched.
template <typename T>
inline f32v load(const T* p, int n) {
    TVK_CHECK(0 <= n && n <= W, n);
#if defined(TVK_AVX512)
    const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
    if constexpr (sizeof(T) == 4) {
        return as<f32v>(_mm512_maskz_loadu_ps(mask, p));
    } else {
        T whole[W] = {};
        const __m256i part = _mm256_maskz_loadu_epi16(mask, p);
        std::memcpy(whole, &part, sizeof(part));
        return load(whole);
    }
#else
#if defined(TVK_AVX2)
    if constexpr (sizeof(T) == 4) {
        return as<f32v>(_mm256_maskload_ps(p, as<__m256i>(first_lanes(n))));
    }
#endif
    T whole[W] = {};
    for (int i = 0; i < n; ++i) {
        whole[i] = p[i];
    }
    return load(whole);
#endif
}

template <typename T>
inline void store(f32v x, T* p, int n) {
    TVK_CHECK(0 <= n && n <= W, n);
#if defined(TVK_AVX512)
    const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
    if constexpr (sizeof(T) == 4) {
        _mm512_mask_storeu_ps(p, mask, as<__m512>(x));
    } else {
        T whole[W];
        store(x, whole);
        _mm256_mask_storeu_epi16(p, mask, read<__m256i>(whole));
    }
#else
#if defined(TVK_AVX2)
    if constexpr (sizeof(T) == 4) {
        _mm256_maskstore_ps(p, as<__m256i>(first_lanes(n)), as<__m256>(x));
        return;
    }
#endif
    T whole[W];
    store(x, whole);
    for (int i = 0; i < n; ++i) {
        p[i] = whole[i];
    }
#endif
}

// All numbers of a vector, as a count that the compiler knows.
struct Whole {
    constexpr operator int() const { return W; }
};

template <typename T>
inline f32v load(const T* p, Whole) {
    return load(p);
}
template <typename T>
inline void store(f32v x, T* p, Whole) {
    store(x, p);
}

// x with zeros after the first n numbers.
inline f32v first(f32v x, int n) {
    TVK_CHECK(0 <= n && n <= W, n);
    return first_lanes(n) ? x : f32v{};
}
inline f32v first(f32v x, Whole) { return x; }

// Calls run(i, n) for the vectors that hold numbers 0 to count: n is Whole, or the int below W
// that the last one holds. The only place that says where a vector ends.
template <typename F>
inline void each_vector(int64_t count, F run) {
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        run(i, Whole());
    }
    if (i < count) {
        run(i, static_cast<int>(count - i));
    }
}

// Sums and maxima across a vector, in a fixed order.
inline float sum(f32v x) {
    float part[W];
    store(x, part);
    for (int width = W / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) {
            part[i] += part[i + width];
        }
    }
    return part[0];
}

inline float max(f32v x) {
    float part[W];
    store(x, part);
    for (int width = W / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) {
            part[i] = part[i] > part[i + width] ? part[i] : part[i + width];
        }
    }
    return part[0];
}

// exp(x): 2^n e^r with |r| <= ln 2 / 2, both by Cody and Waite's reduction; within 1 ulp of the
// exact value above -87.3, where it goes to 0, and +inf above 88.7. NaN stays NaN.
inline f32v exp(f32v x) {
    const f32v lowest = splat(-87.336544f), highest = splat(88.722839f);
    const f32v inside = min(max(x, lowest), highest);
    const f32v magic = splat(0x1.8p23f);  // adding it rounds to the nearest integer
    const f32v shifted = inside * 1.44269504f + magic;
    const f32v n = shifted - magic;
    const f32v r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
    // Remez polynomial of degree 6 of Cephes' expf.
    f32v p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    // 2^n in two factors: n = 128 is beyond one float's exponent.
    const i32v whole = as<i32v>(shifted) - as<i32v>(magic);
    const i32v half = whole >> 1;
    p = p * as<f32v>((half + 127) << 23) * as<f32v>((whole - half + 127) << 23);
    p = x < lowest ? f32v{} : p;
    p = x > highest ? splat(__builtin_inff()) : p;
    return x == x ? p : x;
}

}  // namespace
}  // namespace tvk::TVK_LEVEL
