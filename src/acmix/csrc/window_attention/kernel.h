// Windowed attention: outputs and gradients. Only for kernels, see vec.h.
#pragma once

#include "simd/softmax.h"
#include "simd/table.h"
#include "sliding/bands.h"
#include "sliding/gather.h"
#include "window_attention/job.h"

namespace {

using acmix::Attention;

// k - W_p loc
void subtract_position(const Attention& job, int64_t heads, int64_t y, Rows rows) {
  for_rows(job.g, heads, rows, [&](float* row, int64_t, int64_t c) {
    const Float<kHalf> slope = splat<kHalf>(job.position[2 * c]);
    const Float<kHalf> by_row = splat<kHalf>(job.position[2 * c + 1] * job.row_location[y]);
    for (int64_t x = 0; x < job.g.key_pitch; x += kHalf) {
      store<kHalf>(row + x, load<kHalf>(row + x) -
                                (slope * load<kHalf>(job.column_location + x) + by_row));
    }
  });
}

void stage_keys(const Attention& job, const Task& task, int64_t last, KeyRows& keys) {
  stage_keys(job.g, job.key, task, last, keys, [&](Rows rows, int64_t y) {
    if (job.position) subtract_position(job, task.heads, y, rows);
  });
}

struct ForwardScratch {
  KeyRows keys, values;
  Ring queries, outs;
  float *logits, *lse;
  Share* shares;
  int64_t* weight_offset;

  ForwardScratch(Scratch& s, const Geometry& g)
      : keys(s, g),
        values(s, g),
        queries(make_ring(s, kBand, g.head_group, g.channels, g.query_pitch)),
        outs(make_ring(s, kBand, g.head_group, g.channels, g.query_pitch)),
        logits(s.floats(kBand * g.taps * kLanes)),
        lse(s.floats(kBand * g.query_pitch)),
        shares(s.array<Share>(kBand * g.window)),
        weight_offset(s.array<int64_t>(g.window)) {}
};

struct Attend {
  const Attention& job;
  const ForwardScratch& s;
  Band band;
  int64_t head;

  template <int N>
  void run(int64_t column) const {
    const Geometry& g = job.g;
    float *queries[kBand], *outs[kBand];
    Band local = band;
    local.tap_pitch = N;
    for (int64_t r = 0; r < band.rows; r++) {
      queries[r] = s.queries.at(head, r);
      outs[r] = s.outs.at(head, r);
      local.weight[r] = s.logits + r * g.taps * N;
      for (int64_t c = 0; c < g.channels; c++) {
        store<N>(outs[r] + c * g.query_pitch + column, splat<N>(0.0f));
      }
    }
    fill_offsets(s.weight_offset, g.window, N);
    multiply<N, true>(g, local, queries, g.query_pitch, s.keys.ring, head, column, 0);
    Float<N> inverse[kBand];
    for (int64_t r = 0; r < band.rows; r++) {
      Float<N> largest, sum;
      exponentiate<N>(local.weight[r], g.taps, N, largest, sum);
      inverse[r] = splat<N>(job.alpha) / sum;
      if (job.lse) store<N>(s.lse + r * g.query_pitch + column, largest + log2<N>(sum));
    }
    multiply<N, false>(g, local, outs, g.query_pitch, s.values.ring, head, column, 0);
    for (int64_t r = 0; r < band.rows; r++) {
      for (int64_t c = 0; c < g.channels; c++) {
        float* out = outs[r] + c * g.query_pitch + column;
        store<N>(out, load<N>(out) * inverse[r]);
      }
    }
  }
};

// Of a query row of one of the task's heads, among those of all heads.
int64_t row_number(const Geometry& g, const Task& task, int64_t head, int64_t row) {
  return (task.batch * g.heads + task.head + head) * g.out_height + row;
}

void write_lse(const Attention& job, int64_t row, const float* lse) {
  const int64_t width = job.g.out_width;
  std::memcpy(job.lse + row * width, lse, static_cast<size_t>(width) * sizeof(float));
}

void attention_forward(const Attention& job, int64_t index, float* memory) {
  const Geometry& g = job.g;
  const Task task = split(g, index, g.out_height);
  Scratch scratch(memory);
  ForwardScratch s(scratch, g);
  s.keys.staged = s.values.staged = first_key_row(g, task.begin);
  for (int64_t begin = task.begin; begin < task.end; begin += kBand) {
    const int64_t rows = smaller(kBand, task.end - begin);
    const int64_t last = last_key_row(g, begin + rows - 1);
    stage_keys(job, task, last, s.keys);
    stage_values(g, job.value, task, last, s.values);
    for (int64_t r = 0; r < rows; r++) {
      load_rows(job.query, task.batch, task.head, task.heads, begin + r, s.queries.rows(r, 0));
      scale_rows(g, task.heads, job.scale * kLog2e, g.out_width, s.queries.rows(r, 0));
    }
    Band band{s.shares, share_keys(g, begin, rows, s.shares), rows, {}, 0, s.weight_offset};
    for (int64_t n = 0; n < task.heads; n++) {
      for_columns(g.out_width, Attend{job, s, band, n});
      for (int64_t r = 0; job.lse && r < rows; r++) {
        write_lse(job, row_number(g, task, n, begin + r), s.lse + r * g.query_pitch);
      }
    }
    for (int64_t r = 0; r < rows; r++) {
      store_rows(job.out, task.batch, task.head, task.heads, begin + r, s.outs.rows(r, 0));
    }
  }
}

struct BackwardScratch {
  KeyRows keys, values;
  Ring queries, grad_outs, probabilities, grad_logits, grad_queries;
  float *lse, *delta;
  Share* shares;
  int64_t* weight_offset;
  KeyGradient gradient;

  BackwardScratch(Scratch& s, const Geometry& g)
      : keys(s, g),
        values(s, g),
        queries(make_ring(s, g.query_ring, g.head_group, g.channels, g.query_pitch)),
        grad_outs(make_ring(s, g.query_ring, g.head_group, g.channels, g.query_pitch)),
        probabilities(make_ring(s, g.query_ring, g.head_group, g.taps, g.query_pitch)),
        grad_logits(make_ring(s, g.query_ring, g.head_group, g.taps, g.query_pitch)),
        grad_queries(make_ring(s, kBand, g.head_group, g.channels, g.query_pitch)),
        lse(s.floats(kBand * g.query_pitch)),
        delta(s.floats(kBand * g.query_pitch)),
        shares(s.array<Share>(kBand * g.window)),
        weight_offset(s.array<int64_t>(g.window)),
        gradient(s, g) {}

  void start(const Geometry& g, int64_t first_key) {
    keys.staged = values.staged = first_key;
    clear(queries.data, g.query_ring * queries.row_pitch);
    clear(grad_outs.data, g.query_ring * grad_outs.row_pitch);
    clear(probabilities.data, g.query_ring * probabilities.row_pitch);
    clear(grad_logits.data, g.query_ring * grad_logits.row_pitch);
    clear(lse, kBand * g.query_pitch);
  }
};

void clear_tail(float* rows, int64_t taps, int64_t pitch, int64_t count) {
  for (int64_t t = 0; count > 0 && t < taps; t++) clear(rows + t * pitch, count);
}

struct AttendBackward {
  const Attention& job;
  const BackwardScratch& s;
  Band band;  // its weights are the probabilities
  int64_t begin, head;

  template <int N>
  void run(int64_t column) const {
    const Geometry& g = job.g;
    float *queries[kBand], *grad_outs[kBand], *grad_queries[kBand];
    Band gradients = band;
    for (int64_t r = 0; r < band.rows; r++) {
      queries[r] = s.queries.at(head, begin + r) + g.query_margin;
      grad_outs[r] = s.grad_outs.at(head, begin + r) + g.query_margin;
      grad_queries[r] = s.grad_queries.at(head, r);
      gradients.weight[r] = s.grad_logits.at(head, begin + r) + g.query_margin;
    }
    multiply<N, true>(g, band, queries, g.query_pitch, s.keys.ring, head, column, column);
    multiply<N, true>(g, gradients, grad_outs, g.query_pitch, s.values.ring, head, column, column);
    const int64_t tail = column + N - g.out_width;
    for (int64_t r = 0; r < band.rows; r++) {
      float* p = band.weight[r] + column;
      float* d = gradients.weight[r] + column;
      const int64_t place = r * g.query_pitch + column;
      store<N>(s.delta + place,
               softmax_backward<N>(p, d, g.taps, g.query_pitch, load<N>(s.lse + place)));
      clear_tail(p + N - tail, g.taps, g.query_pitch, tail);
      clear_tail(d + N - tail, g.taps, g.query_pitch, tail);
    }
    multiply<N, false>(g, gradients, grad_queries, g.query_pitch, s.keys.ring, head, column,
                       column);
  }
};

void read_lse(const Attention& job, int64_t row, float* lse) {
  const int64_t width = job.g.out_width;
  std::memcpy(lse, job.lse + row * width, static_cast<size_t>(width) * sizeof(float));
}

// The sum of a query's P dP is the product of its gradient and its output.
void alpha_gradient(const Attention& job, int64_t row, const float* delta) {
  float sum = 0.0f;
  for (int64_t x = 0; x < job.g.out_width; x++) sum += delta[x];
  job.grad_alpha_by_row[row] = sum;
}

// Probabilities and gradients of the logits of a band of queries, and the queries' gradients.
void query_band(const Attention& job, const Task& task, BackwardScratch& s, int64_t begin,
                int64_t rows) {
  const Geometry& g = job.g;
  const int64_t last = last_key_row(g, begin + rows - 1);
  stage_keys(job, task, last, s.keys);
  stage_values(g, job.value, task, last, s.values);
  for (int64_t i = begin; i < begin + rows; i++) {
    stage_queries(g, job.query, task, i, s.queries);
    scale_rows(g, task.heads, job.scale * kLog2e, g.out_width,
               s.queries.rows(i, g.query_margin));
    stage_queries(g, job.grad_out, task, i, s.grad_outs);
  }
  clear(s.grad_queries.data, kBand * s.grad_queries.row_pitch);
  Band band{s.shares,      share_keys(g, begin, rows, s.shares), rows, {},
            g.query_pitch, s.weight_offset};
  for (int64_t n = 0; n < task.heads; n++) {
    for (int64_t r = 0; r < rows; r++) {
      band.weight[r] = s.probabilities.at(n, begin + r) + g.query_margin;
      read_lse(job, row_number(g, task, n, begin + r), s.lse + r * g.query_pitch);
    }
    for_columns(g.out_width, AttendBackward{job, s, band, begin, n});
    for (int64_t r = 0; job.grad_alpha_by_row && r < rows; r++) {
      if (!owns(g, task, begin + r)) continue;
      alpha_gradient(job, row_number(g, task, n, begin + r), s.delta + r * g.query_pitch);
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    if (!owns(g, task, begin + r)) continue;
    scale_rows(g, task.heads, job.alpha * job.scale, g.out_width, s.grad_queries.rows(r, 0));
    store_rows(job.grad_query, task.batch, task.head, task.heads, begin + r,
               s.grad_queries.rows(r, 0));
  }
}

template <int N>
float lane_sum(Float<N> v) {
  float lane[N], sum = 0.0f;
  store<N>(lane, v);
  for (float x : lane) sum += x;
  return sum;
}

// Of a folded row, which is zero where there is no column.
void position_gradient(const Attention& job, const Task& task, int64_t y, Rows rows) {
  const Geometry& g = job.g;
  for_rows(g, task.heads, rows, [&](const float* row, int64_t n, int64_t c) {
    Float<kHalf> by_column = splat<kHalf>(0.0f), by_row = by_column;
    for (int64_t x = 0; x < g.key_pitch; x += kHalf) {
      const Float<kHalf> v = load<kHalf>(row + x);
      by_column -= v * load<kHalf>(job.column_location + x);
      by_row -= v;
    }
    const int64_t plane = (task.batch * g.heads + task.head + n) * g.height + y;
    float* sums = job.grad_position_by_row + (plane * g.channels + c) * 2;
    sums[0] = lane_sum<kHalf>(by_column);
    sums[1] = lane_sum<kHalf>(by_row) * job.row_location[y];
  });
}

void key_band(const Attention& job, const Task& task, BackwardScratch& s, int64_t begin,
              int64_t rows) {
  const Geometry& g = job.g;
  gather_keys(g, task, s.gradient, s.grad_logits, s.queries);
  for (int64_t r = 0; r < rows; r++) {
    const Rows sums = fold_columns(g, s.gradient, task.heads, r, job.alpha * kLn2);
    if (job.grad_position_by_row) position_gradient(job, task, begin + r, sums);
    store_keys(g, job.grad_key, task, begin + r, sums);
  }
  gather_gradient(g, task, s.gradient, s.probabilities, s.grad_outs, job.alpha, job.grad_value,
                  begin, rows);
}

void attention_backward(const Attention& job, int64_t index, float* memory) {
  gradient_task<BackwardScratch>(job, index, memory, query_band, key_band);
}

}  // namespace

const acmix::Kernels<Attention> acmix::ACMIX_KERNELS(attention) = {
    kernel<ForwardScratch>(attention_forward), kernel<BackwardScratch>(attention_backward)};
