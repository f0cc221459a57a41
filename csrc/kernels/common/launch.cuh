// One way to start a kernel, and a block's memory, for nvcc and for the host emulation alike.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// A block's own memory, once in a kernel: TVK_SHARED(Scratch, scratch). The emulation of the
// tests defines another form, which is filled with NaN when a block starts.
#ifndef TVK_SHARED
#define TVK_SHARED(Type, name) __shared__ Type name
#endif

// The same of a size that the launch says, aligned to 16 bytes.
#ifndef TVK_DYNAMIC_SHARED
#define TVK_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#endif

namespace tvk {

// The most dynamic shared memory that a kernel takes, as one of its template arguments: ptxas does
// not report it, tvkernels/testing/cuda_kernels.py reads it in the kernel's name.
template <int BYTES>
struct Dynamic {};

// How much of it the current device lends a block.
inline cudaError_t most_shared(int& bytes) {
    int device = 0;
    const cudaError_t error = cudaGetDevice(&device);
    return error != cudaSuccess
               ? error
               : cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// Blocks on the grid's first axis alone: the others end at 65,535.
template <class... Parameters, class... Arguments>
cudaError_t launch_with(int dynamic_bytes, void (*kernel)(Parameters...), int64_t blocks,
                        int threads, cudaStream_t stream, Arguments&&... arguments) {
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
    config.dynamicSmemBytes = dynamic_bytes;
    if (dynamic_bytes > 48 << 10) {  // beyond it a kernel has to ask
        const cudaError_t error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic_bytes);
        if (error != cudaSuccess) {
            return error;
        }
    }
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   Arguments&&... arguments) {
    return launch_with(0, kernel, blocks, threads, stream, arguments...);
}

}  // namespace tvk
