#include "cpu/common/level.h"

#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

namespace tvk {
namespace {

#define TVK_ITEM(level, ...) Level::level,
constexpr Level HELD[] = {TVK_EACH_LEVEL(TVK_ITEM)};  // by this library

Level best_of_this_cpu() {
    Level most = Level::generic;
#if TVK_X86
    __builtin_cpu_init();
    // Every CPU with AVX2 converts half precision, for which older compilers know no name here.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    most = avx512 ? Level::avx512 : avx2 ? Level::avx2 : Level::generic;
#endif
    Level best = HELD[0];
    for (Level level : HELD) {
        best = level <= most ? level : best;
    }
    return best;
}

Level chosen() {
    const Level best = best_of_this_cpu();
    const char* asked = std::getenv("TVKERNELS_CPU_LEVEL");
    if (asked == nullptr || *asked == '\0') {
        return best;
    }
    std::string names;
    for (Level level : HELD) {
        if (std::strcmp(asked, name(level)) == 0) {
            return level < best ? level : best;
        }
        names += (names.empty() ? "" : level == *std::rbegin(HELD) ? " or " : ", ");
        names += name(level);
    }
    throw std::runtime_error("TVKERNELS_CPU_LEVEL=" + std::string(asked) + ": use " + names);
}

}  // namespace

Level level() {
    static const Level once = chosen();
    return once;
}

const char* name(Level level) {
    constexpr const char* names[] = {"wide", "generic", "avx2", "avx512"};
    return names[static_cast<int>(level)];
}

}  // namespace tvk
