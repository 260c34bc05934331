// The two products of windowed attention over N consecutive queries, for R rows and T taps at once.
// Only for kernels, see vec.h.
//
// A neighbour's vector mostly crosses a cache line, so that its load costs two; each one loaded is
// used for R rows. R x T accumulators, R queries and one neighbour fill the registers.
#pragma once

#include "common/job.h"
#include "simd/table.h"
#include "simd/vec.h"

namespace {

constexpr int kLanes = ACMIX_LANES;
// A row's rest goes in a vector of half the width, where the compiler has one.
constexpr int kHalf = kLanes > 4 ? kLanes / 2 : kLanes;
constexpr int kTaps = ACMIX_REGISTERS == 32 ? 7 : 4;

// R rows against T taps: row r at `row[r]`, its weights (or logits) of tap t at
// `weight[r] + weight_offset[t]`, the neighbour at `source + tap[t]`; channels `*_pitch` apart.
struct Patch {
  float* row[acmix::kBand];
  float* weight[acmix::kBand];
  const int64_t* weight_offset;
  const int64_t* tap;
  const float* source;
  int64_t row_pitch, source_pitch, channels;
};

template <bool Unit>
ACMIX_INLINE const float* neighbour(const Patch& p, const float* source, int t) {
  return Unit ? source + t : source + p.tap[t];
}

// weight[r][t] = sum over channels of row[r] * source[t]
template <int N, int R, int T, bool Unit>
void dots(const Patch& p) {
  Float<N> sum[R][T];
  ACMIX_UNROLL
  for (int r = 0; r < R; r++) {
    ACMIX_UNROLL
    for (int t = 0; t < T; t++) sum[r][t] = splat<N>(0.0f);
  }
  const float* source = Unit ? p.source + p.tap[0] : p.source;
  const float* row[R];
  ACMIX_UNROLL
  for (int r = 0; r < R; r++) row[r] = p.row[r];
  const int64_t channels = p.channels, row_pitch = p.row_pitch, source_pitch = p.source_pitch;
  for (int64_t c = 0; c < channels; c++) {
    Float<N> q[R];
    ACMIX_UNROLL
    for (int r = 0; r < R; r++) q[r] = load<N>(row[r] + c * row_pitch);
    ACMIX_UNROLL
    for (int t = 0; t < T; t++) {
      Float<N> x = load<N>(neighbour<Unit>(p, source, t));
      keep(x);
      ACMIX_UNROLL
      for (int r = 0; r < R; r++) sum[r][t] += q[r] * x;
    }
    source += source_pitch;
  }
  const int64_t* offset = p.weight_offset;
  ACMIX_UNROLL
  for (int r = 0; r < R; r++) {
    ACMIX_UNROLL
    for (int t = 0; t < T; t++) store<N>(p.weight[r] + offset[t], sum[r][t]);
  }
}

// row[r] += sum over taps of weight[r][t] * source[t], channel by channel
template <int N, int R, int T, bool Unit>
void combine(const Patch& p) {
  Float<N> weight[R][T];
  ACMIX_UNROLL
  for (int r = 0; r < R; r++) {
    ACMIX_UNROLL
    for (int t = 0; t < T; t++) weight[r][t] = load<N>(p.weight[r] + p.weight_offset[t]);
  }
  const float* source = Unit ? p.source + p.tap[0] : p.source;
  float* row[R];
  ACMIX_UNROLL
  for (int r = 0; r < R; r++) row[r] = p.row[r];
  const int64_t channels = p.channels, row_pitch = p.row_pitch, source_pitch = p.source_pitch;
  for (int64_t c = 0; c < channels; c++) {
    Float<N> sum[R];
    ACMIX_UNROLL
    for (int r = 0; r < R; r++) sum[r] = load<N>(row[r] + c * row_pitch);
    ACMIX_UNROLL
    for (int t = 0; t < T; t++) {
      Float<N> x = load<N>(neighbour<Unit>(p, source, t));
      keep(x);
      ACMIX_UNROLL
      for (int r = 0; r < R; r++) sum[r] += weight[r][t] * x;
    }
    ACMIX_UNROLL
    for (int r = 0; r < R; r++) store<N>(row[r] + c * row_pitch, sum[r]);
    source += source_pitch;
  }
}

using Product = void (*)(const Patch&);

template <int N, bool Unit, bool Dots>
struct ProductSizes {
  template <int R, int T>
  static constexpr Product at = Dots ? dots<N, R, T, Unit> : combine<N, R, T, Unit>;
};

template <int N, bool Unit, bool Dots>
constexpr auto kProducts = make_table<ProductSizes<N, Unit, Dots>, Product, acmix::kBand, kTaps>();

// Taps in blocks of even size, at most kTaps each.
template <int N, bool Dots>
void apply(Patch patch, int rows, int64_t taps, bool unit) {
  const int64_t blocks = (taps + kTaps - 1) / kTaps;
  for (int64_t block = 0, done = 0; block < blocks; block++) {
    const int64_t count = (taps - done + blocks - block - 1) / (blocks - block);
    const auto& products = unit ? kProducts<N, true, Dots> : kProducts<N, false, Dots>;
    products.of[rows - 1][count - 1](patch);
    patch.tap += count;
    patch.weight_offset += count;
    done += count;
  }
}

}  // namespace
