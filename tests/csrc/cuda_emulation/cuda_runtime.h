// CUDA for a test on the host: a grid's blocks run one after another, a block's threads as fibers
// that take turns at barriers and warp exchanges. Slow, deterministic, for tiny shapes only.
//
// Found before the toolkit's own header of this name. Shared memory is filled with NaN when a
// block starts, and a warp runs to a barrier of its block before the next one takes its turn;
// TVK_EMULATION_BACKWARD=1 runs blocks, warps and threads in the opposite order and asynchronous
// copies as late as they are waited for instead of at once, so that a missing barrier or wait
// shows in one of the two. A thread that leaves while others wait, a barrier that not all reach,
// or an access beyond shared memory, ends the process with a message. TVK_EMULATION_SHARED is how
// many bytes of it the device lends a block, those of sm_80 if unset.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3() = default;
    explicit dim3(unsigned x) : x(x) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;
inline const char* cudaGetErrorString(cudaError_t) { return "refused by a launcher"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
struct cudaFuncAttributes {};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)()) { return cudaSuccess; }

enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    const char* wish = std::getenv("TVK_EMULATION_SHARED");
    *value = wish != nullptr ? std::atoi(wish) : 163 << 10;
    return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
namespace emulation {
inline std::map<const void*, size_t> most_dynamic;  // by kernel, where it was raised
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
    int most;
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
    emulation::most_dynamic[reinterpret_cast<const void*>(kernel)] = bytes;
    return bytes <= most ? cudaSuccess : cudaErrorInvalidValue;
}

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int WARP = 32;
constexpr size_t STACK = 64 << 10;

[[noreturn]] inline void fail(const char* why) {
    std::fprintf(stderr, "cuda emulation: %s\n", why);
    std::abort();
}

inline bool backward() {
    const char* wish = std::getenv("TVK_EMULATION_BACKWARD");
    return wish != nullptr && *wish == '1';
}

// Where threads wait until all of them have come.
struct Meeting {
    int members = 0, arrived = 0, round = 0;
};

// What a lane shows to its warp.
struct Shown {
    uint32_t word[8];
};

// 16 bytes on their way to shared memory; zeros where there is no source.
struct Copy {
    void* to;
    const void* from;
};

struct Fiber {
    ucontext_t context;  // to begin with; then jumps, which ask nothing of the system
    jmp_buf place;
    std::unique_ptr<char[]> stack{new char[STACK]};
    std::deque<std::vector<Copy>> copies;  // groups; the last one is still open
    bool begun = false, done = false;
};

struct Block {
    std::vector<std::unique_ptr<Fiber>> fibers;
    jmp_buf turns;
    void (*body)(void*);
    void* argument;
    unsigned current = 0;
    bool moved = false;  // something happened in this turn of a warp
    Meeting all;
    std::vector<Meeting> warps;
    std::vector<Shown> shown;  // two for each lane, in turns: readers may be one exchange behind
    std::map<const void*, std::vector<char>> shared;
    std::vector<char> dynamic;  // with a margin on both sides

    Meeting& warp() { return warps[current / WARP]; }

    void meet(Meeting& at) {
        const int round = at.round;
        moved = true;
        if (++at.arrived == at.members) {
            at.arrived = 0;
            ++at.round;
        }
        while (at.round == round) {
            if (_setjmp(fibers[current]->place) == 0) {
                _longjmp(turns, 1);
            }
        }
    }

    const Shown* exchange(const Shown& mine) {
        Shown* row = shown.data() + (current / WARP * 2 + warp().round % 2) * WARP;
        row[current % WARP] = mine;
        meet(warp());
        return row;
    }

    std::deque<std::vector<Copy>>& copies() { return fibers[current]->copies; }

    // Carries out this thread's copies but for the last `left` groups.
    void land(size_t left) {
        for (size_t group = 0; group + left < copies().size(); ++group) {
            for (const Copy& copy : copies()[group]) {
                if (copy.from != nullptr) {
                    std::memcpy(copy.to, copy.from, 16);
                } else {
                    std::memset(copy.to, 0, 16);
                }
            }
            copies()[group].clear();
        }
        while (copies().size() > left && copies().size() > 1) {
            copies().pop_front();
        }
    }

    // Runs a thread until it waits or leaves.
    void turn_to(Fiber& fiber) {
        if (_setjmp(turns) != 0) {
            return;
        }
        if (fiber.begun) {
            _longjmp(fiber.place, 1);
        }
        fiber.begun = true;
        setcontext(&fiber.context);
    }

    void leave() {
        for (Meeting* at : {&all, &warp()}) {
            --at->members;
            if (at->arrived > 0) {
                fail("a thread left while others wait for it");
            }
        }
        fibers[current]->done = moved = true;
    }
};

inline Block* block = nullptr;

inline void enter() {
    block->body(block->argument);
    block->leave();
    _longjmp(block->turns, 1);
}

template <class T>
T& shared() {
    static const char key = 0;
    auto& bytes = block->shared[&key];
    if (bytes.empty()) {
        bytes.assign(sizeof(T) + 15, char(0xff));
    }
    return *reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(bytes.data()) + 15) / 16 * 16);
}

constexpr size_t MARGIN = 1024;

inline char* dynamic() { return block->dynamic.data() + MARGIN; }

// What an instruction asks of an address: whole and aligned in shared memory.
inline void check_shared(const void* at, size_t bytes) {
    const auto from = reinterpret_cast<uintptr_t>(at),
               begin = reinterpret_cast<uintptr_t>(dynamic());
    const size_t size = block->dynamic.size() - 2 * MARGIN;
    if (from % bytes != 0 || from < begin || from + bytes > begin + size) {
        fail("an address beyond a block's dynamic shared memory, or not aligned");
    }
}

inline void run_block(Block& b, size_t dynamic_bytes) {
    block = &b;
    b.dynamic.assign(dynamic_bytes + 2 * MARGIN, char(0xff));
    const unsigned threads = blockDim.x;
    b.all = {static_cast<int>(threads)};
    b.warps.assign((threads + WARP - 1) / WARP, {});
    b.shown.resize(b.warps.size() * 2 * WARP);
    b.shared.clear();
    for (unsigned i = 0; i < threads; ++i) {
        ++b.warps[i / WARP].members;
        if (b.fibers.size() <= i) {
            b.fibers.push_back(std::make_unique<Fiber>());
        }
        Fiber& fiber = *b.fibers[i];
        fiber.begun = fiber.done = false;
        fiber.copies.assign(1, {});
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, enter, 0);
    }
    const unsigned warps = b.warps.size();
    for (unsigned left = threads; left > 0;) {
        const unsigned before = left;
        bool any = false;
        for (unsigned w = 0; w < warps; ++w) {
            const unsigned first = (backward() ? warps - 1 - w : w) * WARP;
            const unsigned count = std::min(threads - first, unsigned{WARP});
            do {  // a warp runs as far ahead of the others as it can
                b.moved = false;
                for (unsigned i = 0; i < count; ++i) {
                    b.current = threadIdx.x = first + (backward() ? count - 1 - i : i);
                    Fiber& fiber = *b.fibers[b.current];
                    if (!fiber.done) {
                        b.turn_to(fiber);
                        left -= fiber.done;
                    }
                }
                any |= b.moved;
            } while (b.moved);
        }
        if (!any && left == before) {
            fail("threads wait for others that never come");
        }
    }
    for (size_t i = 0; i < MARGIN; ++i) {
        if (b.dynamic[i] != char(0xff) || b.dynamic[b.dynamic.size() - 1 - i] != char(0xff)) {
            fail("a write beyond a block's dynamic shared memory");
        }
    }
}

}  // namespace emulation

#define TVK_SHARED(Type, name) auto& name = emulation::shared<Type>()
#define TVK_DYNAMIC_SHARED(name) char* const name = emulation::dynamic()

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
    Call call(kernel, std::tuple<Parameters...>(arguments...));
    const size_t most = emulation::most_dynamic[reinterpret_cast<const void*>(kernel)];
    if (config->dynamicSmemBytes > std::max<size_t>(most, 48 << 10)) {
        return cudaErrorInvalidValue;
    }
    gridDim = config->gridDim;
    blockDim = config->blockDim;
    static emulation::Block block;
    block.body = [](void* call) {
        std::apply(static_cast<Call*>(call)->first, static_cast<Call*>(call)->second);
    };
    block.argument = &call;
    for (unsigned i = 0; i < gridDim.x; ++i) {
        blockIdx.x = emulation::backward() ? gridDim.x - 1 - i : i;
        emulation::run_block(block, config->dynamicSmemBytes);
    }
    return cudaSuccess;
}

inline void __syncthreads() { emulation::block->meet(emulation::block->all); }
inline void __syncwarp() { emulation::block->meet(emulation::block->warp()); }

inline float __shfl_xor_sync(unsigned, float mine, int lanes) {
    emulation::Shown shown = {};
    std::memcpy(shown.word, &mine, 4);
    float found;
    const int from = threadIdx.x % emulation::WARP ^ lanes;
    std::memcpy(&found, emulation::block->exchange(shown)[from].word, 4);
    return found;
}

template <class T>
void __stcg(T* to, T value) {
    *to = value;
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t{a} * b >> 32; }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) {
    // The quotient is 0 there: CUDA C++ programming guide, intrinsic functions.
    return std::abs(y) > 0x1p126f && std::abs(y) < INFINITY ? 0 : x / y;
}
