#include "cpu/common/level.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace tvk {
namespace {

Level best_of_this_cpu() {
#if TVK_X86
    __builtin_cpu_init();
    // Every CPU with AVX2 converts half precision, for which older compilers know no name here.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    return avx512 ? Level::avx512 : avx2 ? Level::avx2 : Level::generic;
#else
    return Level::generic;
#endif
}

Level chosen() {
    const Level best = best_of_this_cpu();
    const char* asked = std::getenv("TVKERNELS_CPU_LEVEL");
    if (asked == nullptr || *asked == '\0') {
        return best;
    }
    for (Level level : {Level::generic, Level::avx2, Level::avx512}) {
        if (std::strcmp(asked, name(level)) == 0) {
            return level < best ? level : best;
        }
    }
    throw std::runtime_error("TVKERNELS_CPU_LEVEL=" + std::string(asked) +
                             ": use generic, avx2 or avx512");
}

}  // namespace

Level level() {
    static const Level once = chosen();
    return once;
}

const char* name(Level level) {
    return level == Level::avx512 ? "avx512" : level == Level::avx2 ? "avx2" : "generic";
}

}  // namespace tvk
