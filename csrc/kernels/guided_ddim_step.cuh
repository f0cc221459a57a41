// Guidance, DDIM update and masked blend in one pass; the step's numbers stay on the device, so
// that one captured graph serves every step.
#pragma once

#include <cstdint>

#include "common/strided.h"
#include "kernels/common/launch.cuh"
#include "kernels/common/numbers.cuh"

namespace tvk {

struct GuidedStep {
    enum Operand { SAMPLE, NOISE, MASK, BACKGROUND, OPERANDS };

    Strided<OPERANDS> over;      // sample's shape; strides of 0 where a mask broadcasts
    const void* data[OPERANDS];  // MASK and BACKGROUND null where there is no blend
    Kind kind[OPERANDS];         // BACKGROUND as SAMPLE
    int64_t conditional;         // elements from the unconditional half to the other
    bool guided;                 // noise has two halves
    const void* step;            // alpha_bar now, alpha_bar at the target, guidance
    Kind step_kind;              // f32 or f64
    int64_t step_stride;
    void* out;     // contiguous, of sample's kind
    int64_t size;  // elements of sample, below 2^31
    // Set by the launcher: steps along the inner dimension, and where 16 bytes are read at a time.
    int64_t inner_stride[OPERANDS];
    bool runs[OPERANDS];
};

namespace guided {

constexpr int THREADS = 128;
constexpr int WIDTH = 8;  // elements of a thread: 16 bytes of a 16-bit type

template <class T, int N>
__device__ inline void read_as(const void* data, int64_t at, int64_t stride, bool runs,
                               float (&to)[N]) {
    const T* from = static_cast<const T*>(data) + at;
    if (N > 1 && runs) {
        read_run(from, to);
        return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        to[i] = to_float(from[i * stride]);
    }
}

// N neighbours along the inner dimension; the same branch for all threads.
template <int N>
__device__ inline void read(const GuidedStep& p, int operand, int64_t at, float (&to)[N]) {
    const void* data = p.data[operand];
    const int64_t stride = p.inner_stride[operand];
    const bool runs = p.runs[operand];
    switch (p.kind[operand]) {
        case Kind::boolean:
            return read_as<uint8_t>(data, at, stride, runs, to);
        case Kind::f16:
            return read_as<__half>(data, at, stride, runs, to);
        case Kind::bf16:
            return read_as<__nv_bfloat16>(data, at, stride, runs, to);
        default:
            return read_as<float>(data, at, stride, runs, to);
    }
}

__device__ inline float number(const GuidedStep& p, int i) {
    const int64_t at = i * p.step_stride;
    return p.step_kind == Kind::f64 ? to_float(static_cast<const double*>(p.step)[at])
                                    : static_cast<const float*>(p.step)[at];
}

// N elements of the result for each thread.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) step_kernel(const __grid_constant__ GuidedStep p) {
    using G = GuidedStep;
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * N;
    if (first >= p.size) {
        return;
    }
    int64_t at[G::OPERANDS] = {};
    uint32_t rest = static_cast<uint32_t>(first);
    for (int d = p.over.dims - 1; d >= 0; --d) {
        const uint32_t size = static_cast<uint32_t>(p.over.size[d]);
        const uint32_t i = rest % size;
        rest /= size;
#pragma unroll
        for (int x = 0; x < G::OPERANDS; ++x) {
            at[x] += i * p.over.stride[x][d];
        }
    }
    const float alpha = number(p, 0), target = number(p, 1);
    const float keep = sqrtf(target / alpha);
    const float add = sqrtf(1 - target) - keep * sqrtf(1 - alpha);

    float result[N], noise[N];
    read<N>(p, G::SAMPLE, at[G::SAMPLE], result);
    read<N>(p, G::NOISE, at[G::NOISE], noise);
    if (p.guided) {
        const float guidance = number(p, 2);
        float conditional[N];
        read<N>(p, G::NOISE, at[G::NOISE] + p.conditional, conditional);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            noise[i] += guidance * (conditional[i] - noise[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        result[i] = result[i] * keep + noise[i] * add;
    }
    if (p.data[G::MASK] != nullptr) {
        float weight[N], start[N];
        read<N>(p, G::MASK, at[G::MASK], weight);
        read<N>(p, G::BACKGROUND, at[G::BACKGROUND], start);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            // As torch.lerp: background bit for bit where the mask is 0, the result where it is 1.
            const float away = result[i] - start[i];
            result[i] = weight[i] < 0.5f ? start[i] + weight[i] * away
                                         : result[i] - away * (1 - weight[i]);
        }
    }
    write_run(result, static_cast<T*>(p.out) + first);
}

// Whether runs of WIDTH elements along the inner dimension are aligned wherever they begin.
inline bool in_runs(const GuidedStep& p, int operand) {
    const auto& over = p.over;
    if (p.data[operand] == nullptr || over.inner_stride(operand) != 1) {
        return false;
    }
    const int bytes = bytes_of(p.kind[operand]) * WIDTH;
    bool fits = aligned(p.data[operand], bytes < 16 ? bytes : 16);
    for (int d = 0; d + 1 < over.dims; ++d) {
        fits = fits && over.stride[operand][d] % WIDTH == 0;
    }
    return fits && (operand != GuidedStep::NOISE || p.conditional % WIDTH == 0);
}

}  // namespace guided

// T: storage type of sample, background and result.
template <class T>
cudaError_t launch_guided_ddim_step(GuidedStep p, cudaStream_t stream) {
    using namespace guided;
    for (int x = 0; x < GuidedStep::OPERANDS; ++x) {
        p.inner_stride[x] = p.over.inner_stride(x);
        p.runs[x] = in_runs(p, x);
    }
    // A run must not cross the end of a row.
    const bool wide = p.over.inner() % WIDTH == 0;
    const int64_t blocks = ceil_div(p.size, THREADS * (wide ? WIDTH : 1));
    return launch(wide ? step_kernel<T, WIDTH> : step_kernel<T, 1>, blocks, THREADS, stream, p);
}

}  // namespace tvk
