// Which instruction set runs: every file in cpu/kernels is compiled once per level, each time in
// its own namespace, and the best level of this CPU is chosen at run time. Knows no torch.
#pragma once

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#define TVK_X86 1
#else
#define TVK_X86 0
#endif

namespace tvk {

enum class Level { generic, avx2, avx512 };

// The level in use: the best of this CPU, or less where TVKERNELS_CPU_LEVEL says so. Throws
// std::runtime_error where that variable names no level.
Level level();

const char* name(Level level);

}  // namespace tvk

// Declares one kernel at every level, and best_<name>(), which returns the one to call here.
#if TVK_X86
#define TVK_KERNEL(name, args)                  \
    namespace generic {                         \
    void name args;                             \
    }                                           \
    namespace avx2 {                            \
    void name args;                             \
    }                                           \
    namespace avx512 {                          \
    void name args;                             \
    }                                           \
    inline auto best_##name() -> void(*) args { \
        switch (level()) {                      \
            case Level::avx512:                 \
                return avx512::name;            \
            case Level::avx2:                   \
                return avx2::name;              \
            default:                            \
                return generic::name;           \
        }                                       \
    }                                           \
    static_assert(true, "takes a semicolon")
#else
#define TVK_KERNEL(name, args)                                          \
    namespace generic {                                                 \
    void name args;                                                     \
    }                                                                   \
    inline auto best_##name() -> void(*) args { return generic::name; } \
    static_assert(true, "takes a semicolon")
#endif
