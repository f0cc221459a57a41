// One way to start a kernel, and a block's memory, for nvcc and for the host emulation alike.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// A block's own memory, once in a kernel: TVK_SHARED(Scratch, scratch). The emulation of the
// tests defines another form, which is filled with NaN when a block starts.
#ifndef TVK_SHARED
#define TVK_SHARED(Type, name) __shared__ Type name
#endif

namespace tvk {

// Blocks on the grid's first axis alone: the others end at 65,535.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   Arguments&&... arguments) {
    if (blocks == 0) {
        return cudaSuccess;
    }
    if (blocks > INT32_MAX) {
        return cudaErrorInvalidConfiguration;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace tvk
