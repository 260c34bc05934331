// Correlations of a few planes with weights. Only for kernels, see vec.h.
#pragma once

#include "common/job.h"
#include "simd/table.h"
#include "simd/vec.h"

namespace {

using acmix::Tap;

constexpr int kWide = ACMIX_LANES;
constexpr int kOutputs = 4;                               // rows of outputs at once
constexpr int kVectors = ACMIX_REGISTERS == 32 ? 4 : 2;  // vectors of each

// out[o][n] = sum over inputs and taps of weight * source[input][n + offset]
struct Correlation {
  const float* source;
  int64_t source_pitch, inputs;
  const Tap* taps;
  int64_t count;
  const float* weight;
  int64_t input_step, output_step;
  float* out;
  int64_t out_pitch;
  bool accumulate;
};

template <int N, int O, int V>
void correlate(const Correlation& c) {
  Float<N> sum[O][V];
  ACMIX_UNROLL
  for (int o = 0; o < O; o++) {
    ACMIX_UNROLL
    for (int v = 0; v < V; v++) {
      sum[o][v] = c.accumulate ? load<N>(c.out + o * c.out_pitch + v * N) : splat<N>(0.0f);
    }
  }
  const int64_t count = c.count, step = c.output_step;
  for (int64_t i = 0; i < c.inputs; i++) {
    const float* source = c.source + i * c.source_pitch;
    const float* weights = c.weight + i * c.input_step;
    for (int64_t t = 0; t < count; t++) {
      const float* from = source + c.taps[t].offset;
      const float* weight = weights + c.taps[t].index;
      Float<N> x[V];
      ACMIX_UNROLL
      for (int v = 0; v < V; v++) {
        x[v] = load<N>(from + v * N);
        keep(x[v]);
      }
      ACMIX_UNROLL
      for (int o = 0; o < O; o++) {
        Float<N> w = splat<N>(weight[o * step]);
        keep(w);
        ACMIX_UNROLL
        for (int v = 0; v < V; v++) sum[o][v] += w * x[v];
      }
    }
  }
  ACMIX_UNROLL
  for (int o = 0; o < O; o++) {
    ACMIX_UNROLL
    for (int v = 0; v < V; v++) store<N>(c.out + o * c.out_pitch + v * N, sum[o][v]);
  }
}

using Correlate = void (*)(const Correlation&);

struct CorrelateSizes {
  template <int O, int V>
  static constexpr Correlate at = correlate<kWide, O, V>;
};

constexpr auto kCorrelates = make_table<CorrelateSizes, Correlate, kOutputs, kVectors>();

// All of `outputs` rows of `count` places; places are computed in whole vectors.
void correlate_all(Correlation c, int64_t outputs, int64_t count) {
  const int64_t vectors = (count + kWide - 1) / kWide;
  for (int64_t v = 0, width; v < vectors; v += width) {
    width = smaller(kVectors, vectors - v);
    Correlation block = c;
    block.source += v * kWide;
    block.out += v * kWide;
    for (int64_t o = 0; o < outputs; o += kOutputs) {
      const int64_t rows = smaller(kOutputs, outputs - o);
      kCorrelates.of[rows - 1][width - 1](block);
      block.weight += rows * c.output_step;
      block.out += rows * c.out_pitch;
    }
  }
}

constexpr Tap kNoShift{0, 0};

}  // namespace
