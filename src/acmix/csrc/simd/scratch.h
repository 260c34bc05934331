// A task's memory. Only for kernels, see vec.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Hands out scratch; with a null start it only counts. Under the address sanitizer a gap that must
// not be touched follows each piece.
class Scratch {
 public:
  explicit Scratch(float* start) : start_(start) {}
  float* floats(int64_t count) {
    float* here = start_ ? start_ + used_ : nullptr;
    used_ += (count + 15) / 16 * 16;
#if defined(__SANITIZE_ADDRESS__)
    used_ += 16;
    if (here) {
      __asan_unpoison_memory_region(here, static_cast<size_t>(start_ + used_ - here) * 4);
      __asan_poison_memory_region(here + count,
                                  static_cast<size_t>(start_ + used_ - here - count) * 4);
    }
#endif
    return here;
  }
  template <class T>
  T* array(int64_t count) {
    return reinterpret_cast<T*>(floats(count * static_cast<int64_t>(sizeof(T) / sizeof(float))));
  }
  int64_t used() const { return used_; }

 private:
  float* start_;
  int64_t used_ = 0;
};

void clear(float* p, int64_t count) { std::memset(p, 0, static_cast<size_t>(count) * sizeof *p); }

}  // namespace
