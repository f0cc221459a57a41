// A thread's working memory. Knows no torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace tvk {

// Floats aligned to a cache line, not initialised.
class Scratch {
  public:
    explicit Scratch(int64_t floats)
        : data_(static_cast<float*>(operator new[](floats * sizeof(float), ALIGN))) {}
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { operator delete[](data_, ALIGN); }

    float* data() const { return data_; }

  private:
    static constexpr std::align_val_t ALIGN{64};

    float* data_;
};

}  // namespace tvk
