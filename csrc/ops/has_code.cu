#include "ops/device.h"
#include "ops/ops.h"

namespace tvk {
namespace {

__global__ void probe() {}

}  // namespace

// Whether the library holds code for a device: every file is built for the same architectures.
bool has_code(int64_t device) {
    const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
    cudaFuncAttributes found;
    const bool runs = cudaFuncGetAttributes(&found, probe) == cudaSuccess;
    cudaGetLastError();  // not left for the next launch to find
    return runs;
}

}  // namespace tvk
