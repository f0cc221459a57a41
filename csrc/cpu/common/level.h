// Which instruction set runs: every file in cpu/kernels is compiled once per level, each time in
// its own namespace, and the best level of this CPU is chosen at run time. Knows no torch.
#pragma once

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#define TVK_X86 1
#else
#define TVK_X86 0
#endif

// Floats in a level's vector. `wide` has the widest vectors and no instruction set of its own:
// every CPU runs it, so tests find there what AVX-512 alone would show. No wheel holds it.
#define TVK_WIDTH_wide 16
#define TVK_WIDTH_generic 4
#define TVK_WIDTH_avx2 8
#define TVK_WIDTH_avx512 16

namespace tvk {

enum class Level { wide, generic, avx2, avx512 };

// The level in use: the best of this CPU, or less where TVKERNELS_CPU_LEVEL says so. Throws
// std::runtime_error where that variable names no level of this library.
Level level();

const char* name(Level level);

constexpr int width(Level level) {
    constexpr int widths[] = {TVK_WIDTH_wide, TVK_WIDTH_generic, TVK_WIDTH_avx2, TVK_WIDTH_avx512};
    return widths[static_cast<int>(level)];
}

}  // namespace tvk

// What setup.py has compiled: TVK_EACH_LEVEL(DO, ...) is DO(level, ...) for every level, in the
// enumeration's order.
#ifdef TVK_EACH_LEVEL
// Declares one kernel at every level, and best_<name>(), which returns the one to call here.
#define TVK_KERNEL(name, args)                               \
    TVK_EACH_LEVEL(TVK_DECLARE, name, args)                  \
    inline auto best_##name() -> void(*) args {              \
        switch (level()) {                                   \
            TVK_EACH_LEVEL(TVK_CHOOSE, name, args)           \
            default:                                         \
                return nullptr; /* level() is one of them */ \
        }                                                    \
    }                                                        \
    static_assert(true, "takes a semicolon")
#define TVK_DECLARE(level, name, args) \
    namespace level {                  \
    void name args;                    \
    }
#define TVK_CHOOSE(level, name, args) \
    case Level::level:                \
        return level::name;
#endif
