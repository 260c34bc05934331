// Attention within the windows that a map is cut into: outputs and gradients.
//
// All products are correlations with a single tap. Only for kernels, see vec.h.
#pragma once

#include "partition_attention/job.h"
#include "simd/correlate.h"
#include "simd/finite.h"
#include "simd/pixels.h"
#include "simd/softmax.h"
#include "simd/table.h"

namespace {

using acmix::Partition;
using acmix::PartitionGeometry;

constexpr float kApart = -100.0f;  // added between pixels that only rolling brought together

// Window (i, j) of head `head` of an image.
struct Window {
  int64_t image, head, i, j;
};

void load_tokens(const PartitionGeometry& g, const Tensor& t, const Window& w, float* to) {
  for (int64_t r = 0; r < g.p.rows; r++) {
    load_pixels(t, w.image, w.head, w.i * g.p.rows + r, w.j * g.p.columns, g.p.columns,
                to + r * g.p.columns * g.channel_pitch, g.channel_pitch);
  }
}

void store_tokens(const PartitionGeometry& g, const Tensor& t, const Window& w,
                  const float* from) {
  for (int64_t r = 0; r < g.p.rows; r++) {
    store_pixels(t, w.image, w.head, w.i * g.p.rows + r, w.j * g.p.columns, g.p.columns,
                 from + r * g.p.columns * g.channel_pitch, g.channel_pitch);
  }
}

// Tokens as columns, times a factor.
void turn(const PartitionGeometry& g, const float* tokens, float factor, float* to) {
  load_interleaved(tokens, g.channel_pitch, g.p.channels, to, g.pitch, g.tokens, 0);
  for (int64_t i = 0; factor != 1.0f && i < g.p.channels * g.pitch; i++) to[i] *= factor;
}

// A matrix whose element (i, j) is at data[i * row + j * column].
struct Matrix {
  const float* data;
  int64_t row, column;
};

// out = a b, or out + a b where accumulate is set; rows of b and out are contiguous.
void product(const Matrix& a, int64_t rows, int64_t inner, const float* b, int64_t b_pitch,
             int64_t columns, float* out, int64_t out_pitch, bool accumulate) {
  correlate_all({b, b_pitch, inner, &kNoShift, 1, a.data, a.column, a.row, out, out_pitch,
                 accumulate},
                rows, columns);
}

bool has_mask(const PartitionGeometry& g, const Window& w) {
  return (g.p.row_shift > 0 && w.i == g.down - 1) || (g.p.column_shift > 0 && w.j == g.across - 1);
}

// Adds the mask of a window to its logits. `part` tells the tokens that were rolled to the end of
// the map, along either side, from the others.
void mask(const PartitionGeometry& g, const Window& w, float* part, float* logits) {
  for (int64_t token = 0; token < g.tokens; token++) {
    const int64_t row = token / g.p.columns, column = token % g.p.columns;
    const bool below = w.i == g.down - 1 && row >= g.p.rows - g.p.row_shift;
    const bool right = w.j == g.across - 1 && column >= g.p.columns - g.p.column_shift;
    part[token] = (below ? 2.0f : 0.0f) + (right ? 1.0f : 0.0f);
  }
  for (int64_t key = 0; key < g.tokens; key++, logits += g.pitch) {
    for (int64_t query = 0; query < g.tokens; query++) {
      logits[query] += part[query] == part[key] ? 0.0f : kApart * kLog2e;
    }
  }
}

// The bias of a head, in base 2; lanes without a query are zero.
void stage_bias(const Partition& job, int64_t head, float* bias) {
  const PartitionGeometry& g = job.g;
  const float* from = job.bias + head * g.tokens * g.tokens;
  for (int64_t key = 0; key < g.tokens; key++, from += g.tokens, bias += g.pitch) {
    for (int64_t query = 0; query < g.tokens; query++) bias[query] = from[query] * kLog2e;
    for (int64_t query = g.tokens; query < g.pitch; query++) bias[query] = 0.0f;
  }
}

// Logits in base 2, a key a row: `queries` are columns, scaled.
void window_logits(const Partition& job, const Window& w, const float* keys, const float* queries,
                   const float* bias, float* part, float* logits) {
  const PartitionGeometry& g = job.g;
  std::memcpy(logits, bias, static_cast<size_t>(g.tokens * g.pitch) * sizeof(float));
  if (has_mask(g, w)) mask(g, w, part, logits);
  product({keys, g.channel_pitch, 1}, g.tokens, g.p.channels, queries, g.pitch, g.tokens, logits,
          g.pitch, true);
}

bool finite_tokens(const PartitionGeometry& g, const float* tokens) {
  for (int64_t i = 0; i < g.tokens; i++) {
    if (!all_finite(tokens + i * g.channel_pitch, g.p.channels)) return false;
  }
  return true;
}

float* window_lse(const Partition& job, const Window& w) {
  const PartitionGeometry& g = job.g;
  const int64_t image = w.image * g.p.heads + w.head;
  return job.lse + ((image * g.down + w.i) * g.across + w.j) * g.tokens;
}

// Calls body(window) for the windows of a task: a part of one head's.
template <class Body>
void for_windows(const PartitionGeometry& g, int64_t index, const Body& body) {
  const int64_t head = index % g.p.heads, part = index / g.p.heads;
  const int64_t end = smaller((part + 1) * g.part_rows, g.p.batch * g.down);
  for (int64_t row = part * g.part_rows; row < end; row++) {
    for (int64_t j = 0; j < g.across; j++) body(Window{row / g.down, head, row % g.down, j});
  }
}

struct PartitionForwardScratch {
  float *queries, *keys, *values, *outs, *columns, *bias, *weights, *part, *lse, *inverse;

  PartitionForwardScratch(Scratch& s, const PartitionGeometry& g)
      : queries(s.floats(g.tokens * g.channel_pitch)),
        keys(s.floats(g.tokens * g.channel_pitch)),
        values(s.floats(g.tokens * g.channel_pitch)),
        outs(s.floats(g.tokens * g.channel_pitch)),
        columns(s.floats(g.p.channels * g.pitch)),
        bias(s.floats(g.tokens * g.pitch)),
        weights(s.floats(g.tokens * g.pitch)),
        part(s.floats(g.tokens)),
        lse(s.floats(g.pitch)),
        inverse(s.floats(g.pitch)) {}
};

void partition_forward(const Partition& job, int64_t index, float* memory) {
  const PartitionGeometry& g = job.g;
  Scratch scratch(memory);
  const PartitionForwardScratch s(scratch, g);
  clear(s.columns, g.p.channels * g.pitch);
  stage_bias(job, index % g.p.heads, s.bias);
  for_windows(g, index, [&](const Window& w) {
    load_tokens(g, job.query, w, s.queries);
    load_tokens(g, job.key, w, s.keys);
    load_tokens(g, job.value, w, s.values);
    turn(g, s.queries, job.scale * kLog2e, s.columns);
    window_logits(job, w, s.keys, s.columns, s.bias, s.part, s.weights);
    for (int64_t q = 0; q < g.tokens; q += kWide) {
      Float<kWide> largest, sum;
      exponentiate<kWide>(s.weights + q, g.tokens, g.pitch, largest, sum);
      store<kWide>(s.lse + q, largest + log2<kWide>(sum));
      store<kWide>(s.inverse + q, splat<kWide>(1.0f) / sum);
    }
    std::memcpy(window_lse(job, w), s.lse, static_cast<size_t>(g.tokens) * sizeof(float));
    // Between pixels that are apart weights are as small as numbers get.
    if (has_mask(g, w) && !finite_tokens(g, s.values)) {
      window_logits(job, w, s.keys, s.columns, s.bias, s.part, s.weights);
      for (int64_t q = 0; q < g.tokens; q += kWide) {
        exact_softmax<kWide>(s.weights + q, g.tokens, g.pitch);
        store<kWide>(s.inverse + q, splat<kWide>(1.0f));
      }
    }
    product({s.weights, 1, g.pitch}, g.tokens, g.tokens, s.values, g.channel_pitch, g.p.channels,
            s.outs, g.channel_pitch, false);
    for (int64_t q = 0; q < g.tokens; q++) {
      float* out = s.outs + q * g.channel_pitch;
      for (int64_t c = 0; c < g.p.channels; c++) out[c] *= s.inverse[q];
    }
    store_tokens(g, job.out, w, s.outs);
  });
}

struct PartitionBackwardScratch {
  float *queries, *keys, *values, *grad_outs, *results, *columns, *grad_columns;
  float *bias, *weights, *grad_weights, *part, *lse;

  PartitionBackwardScratch(Scratch& s, const PartitionGeometry& g)
      : queries(s.floats(g.tokens * g.channel_pitch)),
        keys(s.floats(g.tokens * g.channel_pitch)),
        values(s.floats(g.tokens * g.channel_pitch)),
        grad_outs(s.floats(g.tokens * g.channel_pitch)),
        results(s.floats(g.tokens * g.channel_pitch)),
        columns(s.floats(g.p.channels * g.pitch)),
        grad_columns(s.floats(g.p.channels * g.pitch)),
        bias(s.floats(g.tokens * g.pitch)),
        weights(s.floats(g.tokens * g.pitch)),
        grad_weights(s.floats(g.tokens * g.pitch)),
        part(s.floats(g.tokens)),
        lse(s.floats(g.pitch)) {}
};

// results = factor * a b, b being a window's tokens, stored to `to`.
void token_gradient(const PartitionGeometry& g, const Window& w, const Matrix& a, const float* b,
                    float factor, float* results, const Tensor& to) {
  product(a, g.tokens, g.tokens, b, g.channel_pitch, g.p.channels, results, g.channel_pitch,
          false);
  for (int64_t i = 0; factor != 1.0f && i < g.tokens * g.channel_pitch; i++) results[i] *= factor;
  store_tokens(g, to, w, results);
}

void add_bias_gradient(const PartitionGeometry& g, const float* from, float* sums) {
  for (int64_t key = 0; key < g.tokens; key++, from += g.pitch, sums += g.tokens) {
    for (int64_t query = 0; query < g.tokens; query++) sums[query] += from[query];
  }
}

void partition_backward(const Partition& job, int64_t index, float* memory) {
  const PartitionGeometry& g = job.g;
  Scratch scratch(memory);
  const PartitionBackwardScratch s(scratch, g);
  clear(s.columns, g.p.channels * g.pitch);
  clear(s.grad_columns, g.p.channels * g.pitch);
  clear(s.lse, g.pitch);
  clear(s.results, g.tokens * g.channel_pitch);
  stage_bias(job, index % g.p.heads, s.bias);
  float* grad_bias = job.grad_bias ? job.grad_bias + index * g.tokens * g.tokens : nullptr;
  if (grad_bias) clear(grad_bias, g.tokens * g.tokens);
  for_windows(g, index, [&](const Window& w) {
    load_tokens(g, job.query, w, s.queries);
    load_tokens(g, job.key, w, s.keys);
    load_tokens(g, job.value, w, s.values);
    load_tokens(g, job.grad_out, w, s.grad_outs);
    turn(g, s.queries, job.scale * kLog2e, s.columns);
    turn(g, s.grad_outs, 1.0f, s.grad_columns);
    window_logits(job, w, s.keys, s.columns, s.bias, s.part, s.weights);
    product({s.values, g.channel_pitch, 1}, g.tokens, g.p.channels, s.grad_columns, g.pitch,
            g.tokens, s.grad_weights, g.pitch, false);
    std::memcpy(s.lse, window_lse(job, w), static_cast<size_t>(g.tokens) * sizeof(float));
    const bool exact =
        has_mask(g, w) && !(finite_tokens(g, s.values) && finite_tokens(g, s.grad_outs));
    for (int64_t q = 0; q < g.tokens; q += kWide) {
      float *logits = s.weights + q, *gradients = s.grad_weights + q;
      if (exact) {
        exact_softmax_backward<kWide>(logits, gradients, g.tokens, g.pitch);
      } else {
        softmax_backward<kWide>(logits, gradients, g.tokens, g.pitch, load<kWide>(s.lse + q));
      }
    }
    if (grad_bias) add_bias_gradient(g, s.grad_weights, grad_bias);
    const Matrix by_query{s.grad_weights, 1, g.pitch}, by_key{s.grad_weights, g.pitch, 1};
    token_gradient(g, w, by_query, s.keys, job.scale, s.results, job.grad_query);
    token_gradient(g, w, by_key, s.queries, job.scale, s.results, job.grad_key);
    token_gradient(g, w, {s.weights, g.pitch, 1}, s.grad_outs, 1.0f, s.results, job.grad_value);
  });
}

}  // namespace

const acmix::Kernels<Partition> acmix::ACMIX_KERNELS(partition) = {
    kernel<PartitionForwardScratch>(partition_forward),
    kernel<PartitionBackwardScratch>(partition_backward)};
