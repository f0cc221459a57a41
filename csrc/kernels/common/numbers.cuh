// Storage types, the float32 that all arithmetic here is done in, and runs of 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace tvk {

enum class Kind : int { boolean, f16, bf16, f32, f64 };  // what a tensor's elements are

__host__ __device__ constexpr int bytes_of(Kind kind) {
    return kind == Kind::boolean ? 1 : kind == Kind::f32 ? 4 : kind == Kind::f64 ? 8 : 2;
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(double x) { return static_cast<float>(x); }
__device__ inline float to_float(uint8_t x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void from_float(float x, float& to) { to = x; }
__device__ inline void from_float(float x, __half& to) { to = __float2half_rn(x); }
__device__ inline void from_float(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

// Two numbers of a 16-bit type in one register, the first in the lower half.
__device__ inline uint32_t pack(float low, float high, __half) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ inline uint32_t pack(float low, float high, __nv_bfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// What pack has put together, R registers of it.
template <class T, int R>
__device__ inline void unpack(const uint32_t (&words)[R], float (&to)[2 * R]) {
#pragma unroll
    for (int i = 0; i < R; ++i) {
        T found[2];
        memcpy(found, &words[i], 4);
        to[2 * i] = to_float(found[0]);
        to[2 * i + 1] = to_float(found[1]);
    }
}

// The vector type that one instruction reads or writes: 16 bytes, or all where that is less.
template <int BYTES>
using Vector =
    std::conditional_t<BYTES >= 16, uint4, std::conditional_t<BYTES == 8, uint2, uint32_t>>;

// Registers from memory that is aligned for them.
template <int WORDS>
__device__ inline void read_words(const void* from, uint32_t (&to)[WORDS]) {
    using V = Vector<4 * WORDS>;
    constexpr int EACH = sizeof(V) / 4;
#pragma unroll
    for (int i = 0; i < WORDS / EACH; ++i) {
        const V words = static_cast<const V*>(from)[i];
        if constexpr (EACH == 1) {
            to[i] = words;
        } else {
            to[EACH * i] = words.x;
            to[EACH * i + 1] = words.y;
            if constexpr (EACH == 4) {
                to[EACH * i + 2] = words.z;
                to[EACH * i + 3] = words.w;
            }
        }
    }
}

// Of plain assignments in place of __stcg nvcc 13.0 makes four stores of 4 bytes here and there.
template <int WORDS>
__device__ inline void write_words(const uint32_t (&from)[WORDS], void* to) {
    using V = Vector<4 * WORDS>;
    constexpr int EACH = sizeof(V) / 4;
#pragma unroll
    for (int i = 0; i < WORDS / EACH; ++i) {
        V words;
        if constexpr (EACH == 1) {
            words = from[i];
        } else {
            words.x = from[EACH * i];
            words.y = from[EACH * i + 1];
            if constexpr (EACH == 4) {
                words.z = from[EACH * i + 2];
                words.w = from[EACH * i + 3];
            }
        }
        __stcg(static_cast<V*>(to) + i, words);
    }
}

// N neighbours in memory, aligned to 16 bytes where they are as many, as float32.
template <class T, int N>
__device__ inline void read_run(const T* from, float (&to)[N]) {
    if constexpr (N * sizeof(T) % 4 != 0) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            to[i] = to_float(from[i]);
        }
    } else {
        constexpr int EACH = 4 / sizeof(T);
        uint32_t words[N / EACH];
        read_words(from, words);
#pragma unroll
        for (int i = 0; i < N / EACH; ++i) {
            T found[EACH];
            memcpy(found, &words[i], 4);
#pragma unroll
            for (int j = 0; j < EACH; ++j) {
                to[EACH * i + j] = to_float(found[j]);
            }
        }
    }
}

template <class T, int N>
__device__ inline void write_run(const float (&from)[N], T* to) {
    if constexpr (N * sizeof(T) % 4 != 0) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            from_float(from[i], to[i]);
        }
    } else {
        constexpr int EACH = 4 / sizeof(T);
        uint32_t words[N / EACH];
#pragma unroll
        for (int i = 0; i < N / EACH; ++i) {
            if constexpr (EACH == 2) {
                words[i] = pack(from[2 * i], from[2 * i + 1], T());
            } else {
                memcpy(&words[i], &from[i], 4);
            }
        }
        write_words(words, to);
    }
}

inline bool aligned(const void* data, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace tvk
