// Largest error of vec.h's exp in units in the last place, over floats of every magnitude; a line
// for each of those whose result is of the wrong kind.
#include <cmath>
#include <cstdint>
#include <cstdio>

#include "cpu/common/vec.h"

using tvk::TVK_LEVEL::as;
using tvk::TVK_LEVEL::splat;

int main() {
    double worst = 0;
    for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 599) {
        const float x = as<float>(static_cast<uint32_t>(bits));
        const float found = tvk::TVK_LEVEL::exp(splat(x))[0];
        const double exact = std::exp(static_cast<double>(x));
        if (x != x || exact < 0x1p-126 || exact >= 0x1p128) {
            const bool right = x != x             ? found != found
                               : exact >= 0x1p128 ? std::isinf(found)
                                                  : found >= 0 && found <= 0x1.8p-126f;
            if (!right) {
                std::printf("exp(%g) is not %g\n", x, found);
            }
            continue;
        }
        const double ulp = std::ldexp(1.0, std::ilogb(exact) - 23);
        worst = std::fmax(worst, std::fabs(found - exact) / ulp);
    }
    std::printf("%.3f\n", worst);
}
