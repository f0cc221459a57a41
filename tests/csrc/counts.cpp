// A masked load and a masked store of as many numbers as the argument says.

#include <cstdlib>

#include "cpu/common/vec.h"

using namespace tvk::TVK_LEVEL;

int main(int, char** given) {
    const int count = std::atoi(given[1]);
    float numbers[W] = {};
    store(load(numbers, count), numbers, count);
    return first(load(numbers), count)[0] != 0.0f;
}
