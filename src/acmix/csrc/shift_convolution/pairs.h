// Sums of the products of each row with each source. Only for kernels, see vec.h.
#pragma once

#include "simd/convert.h"
#include "simd/correlate.h"

namespace {

constexpr int kSources = ACMIX_REGISTERS == 32 ? 6 : 2;  // inputs against kOutputs rows

// sum[r * sum_pitch + index of s] += sum over `count` places of row[r] * source[offset of s]
struct Pairing {
  const float* row;
  int64_t row_pitch;
  const float* source;
  const Tap* sources;
  float* sum;
  int64_t sum_pitch;
  int64_t count;
};

// The sum over the lanes of each of four vectors.
template <int N>
ACMIX_INLINE Float<4> lane_sums(const Float<N>* v) {
  Float<4> part[4];
  for (int r = 0; r < 4; r++) {
    float lane[N];
    store<N>(lane, v[r]);
    part[r] = load<4>(lane);
    ACMIX_UNROLL
    for (int i = 4; i < N; i += 4) part[r] += load<4>(lane + i);
  }
  transpose(part);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

template <int N, int R, int S>
void pair(const Pairing& p) {
  Float<N> sum[S][kOutputs];
  const float* source[S];
  ACMIX_UNROLL
  for (int s = 0; s < S; s++) {
    source[s] = p.source + p.sources[s].offset;
    ACMIX_UNROLL
    for (int r = 0; r < kOutputs; r++) sum[s][r] = splat<N>(0.0f);
  }
  const float* row = p.row;
  const int64_t pitch = p.row_pitch, count = p.count;
  for (int64_t n = 0; n < count; n += N) {
    Float<N> g[R];
    ACMIX_UNROLL
    for (int r = 0; r < R; r++) {
      g[r] = load<N>(row + r * pitch + n);
      keep(g[r]);
    }
    ACMIX_UNROLL
    for (int s = 0; s < S; s++) {
      Float<N> x = load<N>(source[s] + n);
      keep(x);
      ACMIX_UNROLL
      for (int r = 0; r < R; r++) sum[s][r] += g[r] * x;
    }
  }
  ACMIX_UNROLL
  for (int s = 0; s < S; s++) {
    const Float<4> total = lane_sums<N>(sum[s]);
    float* to = p.sum + p.sources[s].index;
    ACMIX_UNROLL
    for (int r = 0; r < R; r++) to[r * p.sum_pitch] += total[r];
  }
}

using Pair = void (*)(const Pairing&);

struct PairSizes {
  template <int R, int S>
  static constexpr Pair at = pair<kWide, R, S>;
};

constexpr auto kPairs = make_table<PairSizes, Pair, kOutputs, kSources>();

// Every row with every source.
void pair_segment(Pairing p, int64_t rows, int64_t sources) {
  const Pairing all = p;
  for (int64_t r = 0; r < rows; r += kOutputs) {
    p.row = all.row + r * all.row_pitch;
    p.sum = all.sum + r * all.sum_pitch;
    p.sources = all.sources;
    for (int64_t s = 0; s < sources; s += kSources, p.sources += kSources) {
      kPairs.of[smaller(kOutputs, rows - r) - 1][smaller(kSources, sources - s) - 1](p);
    }
  }
}

// The same, a few places at a time: the sources' stay in the first-level cache.
void pair_all(const Pairing& p, int64_t rows, int64_t sources) {
  constexpr int64_t segment = 1024;
  for (int64_t at = 0; at < p.count; at += segment) {
    Pairing part = p;
    part.row += at;
    part.source += at;
    part.count = smaller(segment, p.count - at);
    pair_segment(part, rows, sources);
  }
}

}  // namespace
