// Gradients of keys and values: each gathers from the queries whose windows hold it.
// Only for kernels, see vec.h.
#pragma once

#include "sliding/bands.h"

namespace {

// The query rows in [first, last] whose windows hold a key row of [begin, begin + rows). Near a
// border a window may hold it more than once: each time in a share of its own.
int64_t share_queries(const Geometry& g, int64_t begin, int64_t rows, int64_t first, int64_t last,
                      Share* shares) {
  int64_t count = 0;
  for (int64_t i = first; i <= last; i++) {
    bool fresh = true, used[kBand] = {};
    for (int64_t a = 0; a < g.window; a++) {
      const int64_t key = i * g.row_stride + (a - g.radius) * g.row_dilation;
      const int64_t r = reflect(key, g.height) - begin;
      if (r < 0 || r >= rows) continue;
      if (fresh || used[r]) {
        shares[count++] = {i, 0, {}, {}};
        for (bool& u : used) u = false;
        fresh = false;
      }
      Share& s = shares[count - 1];
      s.row[s.count] = static_cast<int32_t>(r);
      s.tap[s.count++] = static_cast<int32_t>(a);
      used[r] = true;
    }
  }
  return count;
}

struct KeyGradient {
  Ring sums;      // one band of key rows
  Share* shares;  // of their queries
  int64_t count;  // of the shares
  int64_t *tap, *weight_offset, *first_of_phase;

  KeyGradient(Scratch& s, const Geometry& g)
      : sums(make_ring(s, kBand, g.head_group, g.channels, g.key_pitch)),
        shares(s.array<Share>((g.query_ring + 1) * g.window)),
        count(0),
        tap(s.array<int64_t>(g.window)),
        weight_offset(s.array<int64_t>(g.window)),
        first_of_phase(s.array<int64_t>(g.column_stride + 1)) {}

  // Taps by the phase of the columns that they reach, the last first: a key's query through tap b
  // is tap_offset[b] columns before it, so that they come in rising order.
  void list_taps(const Geometry& g) {
    int64_t count = 0;
    for (int64_t phase = 0; phase < g.column_stride; phase++) {
      first_of_phase[phase] = count;
      for (int64_t b = g.window - 1; b >= 0; b--) {
        if (g.tap_offset[b] / g.phase_pitch != phase) continue;
        tap[count] = -(g.tap_offset[b] % g.phase_pitch);
        weight_offset[count] = b * g.query_pitch + tap[count];
        count++;
      }
    }
    first_of_phase[g.column_stride] = count;
  }
};

int64_t first_query_row(const Geometry& g, int64_t key) {
  return (larger(0, key - g.radius * g.row_dilation) + g.row_stride - 1) / g.row_stride;
}

int64_t last_query_row(const Geometry& g, int64_t key) {
  return smaller(g.out_height - 1, (key + g.radius * g.row_dilation) / g.row_stride);
}

// Before gather_keys: the queries whose windows hold the key rows [begin, begin + rows).
void find_queries(const Geometry& g, int64_t begin, int64_t rows, KeyGradient& k) {
  k.count = share_queries(g, begin, rows, first_query_row(g, begin),
                          last_query_row(g, begin + rows - 1), k.shares);
}

struct Gather {
  const Geometry& g;
  const KeyGradient& k;
  const Ring &weights, &queries;
  int64_t head, phase;

  template <int N>
  void run(int64_t column) const {
    const int64_t first = k.first_of_phase[phase];
    const int64_t taps = k.first_of_phase[phase + 1] - first;
    Patch p{};
    p.weight_offset = k.weight_offset + first;
    p.tap = k.tap + first;
    p.row_pitch = g.key_pitch;
    p.source_pitch = g.query_pitch;
    p.channels = g.channels;
    for (const Share* s = k.shares; s < k.shares + k.count; s++) {
      p.source = queries.at(head, s->source) + g.query_margin + column;
      for (int r = 0; r < s->count; r++) {
        p.row[r] = k.sums.at(head, s->row[r]) + phase * g.phase_pitch + column;
        p.weight[r] = weights.at(head, s->source) +
                      s->tap[r] * g.window * g.query_pitch + g.query_margin + column;
      }
      apply<N, false>(p, s->count, taps, g.unit_taps);
    }
  }
};

// A row of sums times `factor`, its reflected columns added to those that they reflect and zeros
// left where they were.
Rows fold_columns(const Geometry& g, const KeyGradient& k, int64_t heads, int64_t row,
                  float factor) {
  const Rows rows = k.sums.rows(row, 0);
  for_rows(g, heads, rows, [&](float* sums, int64_t, int64_t) {
    for (int64_t i = 0; i < g.edges; i++) {
      sums[g.edge[i].from] += sums[g.edge[i].to];
      sums[g.edge[i].to] = 0.0f;
    }
  });
  scale_rows(g, heads, factor, g.key_pitch, rows);
  return rows;
}

void store_keys(const Geometry& g, const Tensor& tensor, const Task& task, int64_t y, Rows rows) {
  for_phases(g, tensor, rows, [&](const Tensor& columns, Rows places) {
    store_rows(columns, task.batch, task.head, task.heads, y, places);
  });
}

// Fills the sums of a band of key rows, over the queries found for it.
void gather_keys(const Geometry& g, const Task& task, const KeyGradient& k, const Ring& weights,
                 const Ring& queries) {
  clear(k.sums.data, kBand * k.sums.row_pitch);
  for (int64_t n = 0; n < task.heads; n++) {
    for (int64_t phase = 0; phase < g.column_stride; phase++) {
      if (k.first_of_phase[phase] == k.first_of_phase[phase + 1]) continue;
      const int64_t width = (g.padded_width - phase + g.column_stride - 1) / g.column_stride;
      for_columns(width, Gather{g, k, weights, queries, n, phase});
    }
  }
}

// Query rows for the gather: zero outside the map.
void stage_queries(const Geometry& g, const Tensor& tensor, const Task& task, int64_t row,
                   const Ring& ring) {
  load_rows(tensor, task.batch, task.head, task.heads, row, ring.rows(row, g.query_margin));
}

// Whether the results of a query row are this task's, not a neighbouring one's.
bool owns(const Geometry& g, const Task& task, int64_t query) {
  const int64_t y = query * g.row_stride;
  return y >= task.begin && y < task.end;
}

// A band of key rows' gradients: the sums over their queries, times `factor`.
void gather_gradient(const Geometry& g, const Task& task, const KeyGradient& k,
                     const Ring& weights, const Ring& queries, float factor, const Tensor& tensor,
                     int64_t begin, int64_t rows) {
  gather_keys(g, task, k, weights, queries);
  for (int64_t r = 0; r < rows; r++) {
    store_keys(g, tensor, task, begin + r, fold_columns(g, k, task.heads, r, factor));
  }
}

// A task of a backward pass, with scratch S. Calls query_band(job, task, scratch, begin, rows) for
// bands of the queries that the task's keys meet and, as soon as all queries of a band of keys are
// done, key_band for it.
template <class S, class Job, class QueryBand, class KeyBand>
void gradient_task(const Job& job, int64_t index, float* memory, const QueryBand& query_band,
                   const KeyBand& key_band) {
  const Geometry& g = job.g;
  const Task task = split(g, index, g.height);
  Scratch scratch(memory);
  S s(scratch, g);
  fill_offsets(s.weight_offset, g.window, g.query_pitch);
  s.gradient.list_taps(g);
  const int64_t first = first_query_row(g, task.begin), last = last_query_row(g, task.end - 1);
  s.start(g, first_key_row(g, first));
  int64_t key = task.begin;
  for (int64_t begin = first; key < task.end; begin += kBand) {
    const int64_t rows = larger(0, smaller(kBand, last + 1 - begin));
    if (rows > 0) query_band(job, task, s, begin, rows);
    while (key < task.end) {
      const int64_t key_rows = smaller(kBand, task.end - key);
      if (last_query_row(g, key + key_rows - 1) >= begin + rows) break;
      find_queries(g, key, key_rows, s.gradient);
      key_band(job, task, s, key, key_rows);
      key += key_rows;
    }
  }
}

}  // namespace
