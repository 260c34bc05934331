// Whether numbers are finite. Only for kernels, see vec.h.
//
// Zeros that pad the scratch add nothing to a sum, except where they meet an infinity or NaN. So
// sums are taken over the padding too, and taken again without it where something is not finite.
#pragma once

#include "simd/vec.h"

namespace {

ACMIX_INLINE bool is_finite(float x) { return x - x == 0.0f; }

bool all_finite(const float* numbers, int64_t count) {
  constexpr int lanes = ACMIX_LANES;
  Float<lanes> sum = splat<lanes>(0.0f);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const Float<lanes> x = load<lanes>(numbers + i);
    sum += x - x;  // 0, or NaN
  }
  float rest = 0.0f, lane[lanes];
  for (; i < count; i++) rest += numbers[i] - numbers[i];
  store<lanes>(lane, sum);
  for (float x : lane) rest += x;
  return rest == 0.0f;
}

}  // namespace
