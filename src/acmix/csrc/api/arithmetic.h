// Arithmetic of sizes.
#pragma once

#include <cstdint>

namespace acmix {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
constexpr int64_t floor_div(int64_t n, int64_t by) { return n >= 0 ? n / by : -ceil_div(-n, by); }

// Rows an odd number of cache lines apart, or of half lines for short ones: else the channels of
// one column compete for a few sets of the first-level cache.
constexpr int64_t spread(int64_t floats) {
  if (floats > 48) return round_up(floats, 16) | 16;
  const int64_t pitch = round_up(floats, 8);
  return pitch == 32 ? 40 : pitch;
}

}  // namespace acmix
