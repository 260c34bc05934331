// Reflection at the borders of a map. With internal linkage, for kernels too: see vec.h.
#pragma once

#include <cstdint>

namespace {

// The last of `size` rows met by going to row i and turning round at both ends.
constexpr int64_t reflect(int64_t i, int64_t size) {
  const int64_t period = size > 1 ? 2 * (size - 1) : 1;
  const int64_t phase = (i % period + period) % period;
  return phase < size ? phase : period - phase;
}

}  // namespace
