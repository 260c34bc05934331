// Weighted aggregation: the sums and their gradients. Only for kernels, see vec.h.
#pragma once

#include "simd/table.h"
#include "sliding/bands.h"
#include "sliding/gather.h"
#include "weighted_aggregation/job.h"

namespace {

using acmix::Aggregation;

struct AggregationScratch {
  KeyRows values;
  Ring weights, outs;
  Share* shares;
  int64_t* weight_offset;

  AggregationScratch(Scratch& s, const Geometry& g)
      : values(s, g),
        weights(make_ring(s, kBand, g.head_group, g.taps, g.query_pitch)),
        outs(make_ring(s, kBand, g.head_group, g.channels, g.query_pitch)),
        shares(s.array<Share>(kBand * g.window)),
        weight_offset(s.array<int64_t>(g.window)) {}
};

struct Aggregate {
  const Geometry& g;
  const AggregationScratch& s;
  const Band& band;
  int64_t head;

  template <int N>
  void run(int64_t column) const {
    float* outs[kBand];
    for (int64_t r = 0; r < band.rows; r++) outs[r] = s.outs.at(head, r);
    multiply<N, false>(g, band, outs, g.query_pitch, s.values.ring, head, column, column);
  }
};

void aggregation_forward(const Aggregation& job, int64_t index, float* memory) {
  const Geometry& g = job.g;
  const Task task = split(g, index, g.out_height);
  Scratch scratch(memory);
  AggregationScratch s(scratch, g);
  fill_offsets(s.weight_offset, g.window, g.query_pitch);
  s.values.staged = first_key_row(g, task.begin);
  for (int64_t begin = task.begin; begin < task.end; begin += kBand) {
    const int64_t rows = smaller(kBand, task.end - begin);
    stage_values(g, job.value, task, last_key_row(g, begin + rows - 1), s.values);
    for (int64_t r = 0; r < rows; r++) {
      load_rows(job.weight, task.batch, task.head, task.heads, begin + r, s.weights.rows(r, 0));
    }
    clear(s.outs.data, kBand * s.outs.row_pitch);
    Band band{s.shares,      share_keys(g, begin, rows, s.shares), rows, {},
              g.query_pitch, s.weight_offset};
    for (int64_t n = 0; n < task.heads; n++) {
      for (int64_t r = 0; r < rows; r++) band.weight[r] = s.weights.at(n, r);
      for_columns(g.out_width, Aggregate{g, s, band, n});
    }
    for (int64_t r = 0; r < rows; r++) {
      store_rows(job.out, task.batch, task.head, task.heads, begin + r, s.outs.rows(r, 0));
    }
  }
}

struct AggregationBackwardScratch {
  KeyRows values;
  Ring weights, grad_outs, grad_weights;
  Share* shares;
  int64_t* weight_offset;
  KeyGradient gradient;

  AggregationBackwardScratch(Scratch& s, const Geometry& g)
      : values(s, g),
        weights(make_ring(s, g.query_ring, g.head_group, g.taps, g.query_pitch)),
        grad_outs(make_ring(s, g.query_ring, g.head_group, g.channels, g.query_pitch)),
        grad_weights(make_ring(s, kBand, g.head_group, g.taps, g.query_pitch)),
        shares(s.array<Share>(kBand * g.window)),
        weight_offset(s.array<int64_t>(g.window)),
        gradient(s, g) {}

  void start(const Geometry& g, int64_t first_key) {
    values.staged = first_key;
    clear(weights.data, g.query_ring * weights.row_pitch);
    clear(grad_outs.data, g.query_ring * grad_outs.row_pitch);
  }
};

struct WeightGradient {
  const Geometry& g;
  const AggregationBackwardScratch& s;
  const Band& band;
  int64_t begin, head;

  template <int N>
  void run(int64_t column) const {
    float* grad_outs[kBand];
    for (int64_t r = 0; r < band.rows; r++) {
      grad_outs[r] = s.grad_outs.at(head, begin + r) + g.query_margin;
    }
    multiply<N, true>(g, band, grad_outs, g.query_pitch, s.values.ring, head, column, column);
  }
};

void weight_band(const Aggregation& job, const Task& task, AggregationBackwardScratch& s,
                 int64_t begin, int64_t rows) {
  const Geometry& g = job.g;
  stage_values(g, job.value, task, last_key_row(g, begin + rows - 1), s.values);
  for (int64_t i = begin; i < begin + rows; i++) {
    stage_queries(g, job.weight, task, i, s.weights);
    stage_queries(g, job.grad_out, task, i, s.grad_outs);
  }
  Band band{s.shares,      share_keys(g, begin, rows, s.shares), rows, {},
            g.query_pitch, s.weight_offset};
  for (int64_t n = 0; n < task.heads; n++) {
    for (int64_t r = 0; r < rows; r++) band.weight[r] = s.grad_weights.at(n, r);
    for_columns(g.out_width, WeightGradient{g, s, band, begin, n});
  }
  for (int64_t r = 0; r < rows; r++) {
    if (!owns(g, task, begin + r)) continue;
    store_rows(job.grad_weight, task.batch, task.head, task.heads, begin + r,
               s.grad_weights.rows(r, 0));
  }
}

void value_band(const Aggregation& job, const Task& task, AggregationBackwardScratch& s,
                int64_t begin, int64_t rows) {
  gather_gradient(job.g, task, s.gradient, s.weights, s.grad_outs, 1.0f, job.grad_value, begin,
                  rows);
}

void aggregation_backward(const Aggregation& job, int64_t index, float* memory) {
  gradient_task<AggregationBackwardScratch>(job, index, memory, weight_band, value_band);
}

}  // namespace

const acmix::Kernels<Aggregation> acmix::ACMIX_KERNELS(aggregation) = {
    kernel<AggregationScratch>(aggregation_forward),
    kernel<AggregationBackwardScratch>(aggregation_backward)};
