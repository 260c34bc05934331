// Windowed attention, weighted aggregation and, in shift.h and partition.h, the shift convolution
// and attention within windows, for one instruction set; compiled once for each, with ACMIX_ISA as its name. Includes no standard C++
// header: a shared inline function compiled here with wider instructions could be the one that the
// linker keeps.

#include "partition.h"
#include "rows.h"
#include "scratch.h"
#include "shift.h"
#include "softmax.h"
#include "window.h"

namespace {

using acmix::Aggregation;
using acmix::Attention;
using acmix::Geometry;
using acmix::kBand;

// What a task works on: some heads of one image, and rows [begin, end) of queries or keys.
struct Task {
  int64_t batch, head, heads, begin, end;
};

Task split(const Geometry& g, int64_t task, int64_t rows) {
  const int64_t chunk = task % g.chunks;
  const int64_t group = task / g.chunks % g.groups;
  const int64_t head = group * g.head_group;
  return {task / g.chunks / g.groups, head, smaller(g.head_group, g.heads - head),
          chunk * g.row_chunk, smaller((chunk + 1) * g.row_chunk, rows)};
}

// The last of `size` rows met by going to row i and turning round at both ends.
int64_t reflect(int64_t i, int64_t size) {
  const int64_t period = larger(2 * (size - 1), 1);
  const int64_t phase = (i % period + period) % period;
  return phase < size ? phase : period - phase;
}

// One source row and the rows of a band that use it, each through a row of its window.
struct Share {
  int64_t source;
  int32_t count, row[kBand], tap[kBand];
};

// The key rows of the queries in [begin, begin + rows), from the top down.
int64_t share_keys(const Geometry& g, int64_t begin, int64_t rows, Share* shares) {
  int64_t next[kBand] = {}, count = 0;
  for (;;) {
    int64_t top = INT64_MAX;
    const auto position = [&](int64_t r) {
      return (begin + r) * g.row_stride + (next[r] - g.radius) * g.row_dilation;
    };
    for (int64_t r = 0; r < rows; r++) {
      if (next[r] < g.window) top = smaller(top, position(r));
    }
    if (top == INT64_MAX) return count;
    Share& s = shares[count++];
    s = {reflect(top, g.height), 0, {}, {}};
    for (int64_t r = 0; r < rows; r++) {
      if (next[r] == g.window || position(r) != top) continue;
      s.row[s.count] = static_cast<int32_t>(r);
      s.tap[s.count++] = static_cast<int32_t>(next[r]++);
    }
  }
}

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

// Image rows of a group of heads in scratch, as many as a band's windows reach, each in the slot
// of its number modulo `slots`.
struct Ring {
  float* data;
  int64_t slots, row_pitch, head_pitch, channel_pitch;

  float* at(int64_t head, int64_t row) const {
    return data + row % slots * row_pitch + head * head_pitch;
  }
  Rows rows(int64_t row, int64_t column) const {
    return {at(0, row) + column, head_pitch, channel_pitch};
  }
};

Ring make_ring(Scratch& scratch, int64_t slots, int64_t heads, int64_t channels, int64_t pitch) {
  return {scratch.floats(slots * heads * channels * pitch), slots, heads * channels * pitch,
          channels * pitch, pitch};
}

// Key rows, staged up to a row of the image.
struct KeyRows {
  Ring ring;
  int64_t staged;

  KeyRows(Scratch& scratch, const Geometry& g)
      : ring(make_ring(scratch, g.key_ring, g.head_group, g.channels, g.key_pitch)), staged(0) {}
};

// Calls body(row, head, channel) for the rows of some heads.
template <class Body>
void for_rows(const Geometry& g, int64_t heads, Rows rows, const Body& body) {
  for (int64_t n = 0; n < heads; n++) {
    for (int64_t c = 0; c < g.channels; c++) {
      body(rows.data + n * rows.head_pitch + c * rows.channel_pitch, n, c);
    }
  }
}

// Calls body(columns, places) with the columns of a tensor that are of one phase, and the places of
// key rows where they belong.
template <class Body>
void for_phases(const Geometry& g, const Tensor& t, Rows rows, const Body& body) {
  for (int64_t p = 0; p < g.column_stride; p++) {
    body(every(t, 4, g.phase[p].column, g.column_stride),
         {rows.data + g.phase[p].place, rows.head_pitch, rows.channel_pitch});
  }
}

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

// Rows up to `last`; `position` is null for values.
void stage_keys(const Geometry& g, const Tensor& tensor, const Attention* position,
                const Task& task, int64_t last, KeyRows& keys) {
  for (; keys.staged <= last; keys.staged++) {
    const Rows rows = keys.ring.rows(keys.staged, 0);
    for_phases(g, tensor, rows, [&](const Tensor& columns, Rows places) {
      load_rows(columns, task.batch, task.head, task.heads, keys.staged, places);
    });
    for_rows(g, task.heads, rows, [&](float* row, int64_t, int64_t) {
      for (int64_t i = 0; i < g.edges; i++) row[g.edge[i].to] = row[g.edge[i].from];
    });
    if (position) subtract_position(*position, task.heads, keys.staged, rows);
  }
}

void scale_rows(const Geometry& g, int64_t heads, float factor, int64_t width, Rows rows) {
  for_rows(g, heads, rows, [&](float* row, int64_t, int64_t) {
    for (int64_t x = 0; x < width; x++) row[x] *= factor;
  });
}

int64_t last_key_row(const Geometry& g, int64_t last_query) {
  return smaller(g.height - 1, last_query * g.row_stride + g.radius * g.row_dilation);
}

int64_t first_key_row(const Geometry& g, int64_t query) {
  return larger(0, query * g.row_stride - g.radius * g.row_dilation);
}

// Query rows of a band for one head, and where the weights of their windows are.
struct Band {
  const Share* shares;
  int64_t count, rows;
  float* weight[kBand];
  int64_t tap_pitch;              // from one tap's weights to the next
  const int64_t* weight_offset;   // [window]
};

// A product of a band's rows with the key rows of one head, N queries from `column` on.
template <int N, bool Dots>
void multiply(const Geometry& g, const Band& band, float* const* rows, int64_t row_pitch,
              const Ring& keys, int64_t head, int64_t column, int64_t weight_column) {
  Patch p{};
  p.weight_offset = band.weight_offset;
  p.tap = g.tap_offset;
  p.row_pitch = row_pitch;
  p.source_pitch = g.key_pitch;
  p.channels = g.channels;
  for (const Share* s = band.shares; s < band.shares + band.count; s++) {
    p.source = keys.at(head, s->source) + column;
    for (int r = 0; r < s->count; r++) {
      p.row[r] = rows[s->row[r]] + column;
      p.weight[r] =
          band.weight[s->row[r]] + s->tap[r] * g.window * band.tap_pitch + weight_column;
    }
    apply<N, Dots>(p, s->count, g.window, g.unit_taps);
  }
}

// Calls body.template run<N>(column) for vectors of queries that cover [0, width).
template <class Body>
void for_columns(int64_t width, const Body& body) {
  int64_t column = 0;
  for (; width - column > kHalf; column += kLanes) body.template run<kLanes>(column);
  if (column < width) body.template run<kHalf>(column);
}

void fill_offsets(int64_t* offset, int64_t count, int64_t step) {
  for (int64_t i = 0; i < count; i++) offset[i] = i * step;
}

// Attention, forward.

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

void write_lse(const Attention& job, const Task& task, int64_t head, int64_t row,
               const float* lse) {
  const Geometry& g = job.g;
  const int64_t plane = (task.batch * g.heads + task.head + head) * g.out_height + row;
  std::memcpy(job.lse + plane * g.out_width, lse,
              static_cast<size_t>(g.out_width) * sizeof(float));
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
    stage_keys(g, job.key, job.position ? &job : nullptr, task, last, s.keys);
    stage_keys(g, job.value, nullptr, task, last, s.values);
    for (int64_t r = 0; r < rows; r++) {
      load_rows(job.query, task.batch, task.head, task.heads, begin + r, s.queries.rows(r, 0));
      scale_rows(g, task.heads, job.scale * kLog2e, g.out_width, s.queries.rows(r, 0));
    }
    Band band{s.shares, share_keys(g, begin, rows, s.shares), rows, {}, 0, s.weight_offset};
    for (int64_t n = 0; n < task.heads; n++) {
      for_columns(g.out_width, Attend{job, s, band, n});
      for (int64_t r = 0; job.lse && r < rows; r++) {
        write_lse(job, task, n, begin + r, s.lse + r * g.query_pitch);
      }
    }
    for (int64_t r = 0; r < rows; r++) {
      store_rows(job.out, task.batch, task.head, task.heads, begin + r, s.outs.rows(r, 0));
    }
  }
}

// Gradients of keys, values: each gathers from the queries whose windows hold it.

struct KeyGradient {
  Ring sums;  // one band of key rows
  Share* shares;
  int64_t *tap, *weight_offset, *first_of_phase;

  KeyGradient(Scratch& s, const Geometry& g)
      : sums(make_ring(s, kBand, g.head_group, g.channels, g.key_pitch)),
        shares(s.array<Share>((g.query_ring + 1) * g.window)),
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

struct Gather {
  const Geometry& g;
  const KeyGradient& k;
  const Ring &weights, &queries;
  int64_t head, count, phase;

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
    for (const Share* s = k.shares; s < k.shares + count; s++) {
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

// The sums over a band's query rows, [begin, begin + rows) being key rows.
void gather_keys(const Geometry& g, const Task& task, const KeyGradient& k, int64_t count,
                 const Ring& weights, const Ring& queries) {
  clear(k.sums.data, kBand * k.sums.row_pitch);
  for (int64_t n = 0; n < task.heads; n++) {
    for (int64_t phase = 0; phase < g.column_stride; phase++) {
      if (k.first_of_phase[phase] == k.first_of_phase[phase + 1]) continue;
      const int64_t width = (g.padded_width - phase + g.column_stride - 1) / g.column_stride;
      for_columns(width, Gather{g, k, weights, queries, n, count, phase});
    }
  }
}

int64_t first_query_row(const Geometry& g, int64_t key) {
  return (larger(0, key - g.radius * g.row_dilation) + g.row_stride - 1) / g.row_stride;
}

int64_t last_query_row(const Geometry& g, int64_t key) {
  return smaller(g.out_height - 1, (key + g.radius * g.row_dilation) / g.row_stride);
}

// Query rows for the gather: zero outside the map.
void stage_queries(const Geometry& g, const Tensor& tensor, const Task& task, int64_t row,
                   const Ring& ring) {
  load_rows(tensor, task.batch, task.head, task.heads, row, ring.rows(row, g.query_margin));
}

// Attention, backward.

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

  void clear_rings(const Geometry& g) {
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

void read_lse(const Attention& job, const Task& task, int64_t head, int64_t row, float* lse) {
  const Geometry& g = job.g;
  const int64_t plane = (task.batch * g.heads + task.head + head) * g.out_height + row;
  std::memcpy(lse, job.lse + plane * g.out_width,
              static_cast<size_t>(g.out_width) * sizeof(float));
}

// The sum of a query's P dP is the product of its gradient and its output.
void alpha_gradient(const Attention& job, const Task& task, int64_t head, int64_t row,
                    const float* delta) {
  const Geometry& g = job.g;
  float sum = 0.0f;
  for (int64_t x = 0; x < g.out_width; x++) sum += delta[x];
  job.grad_alpha_by_row[(task.batch * g.heads + task.head + head) * g.out_height + row] = sum;
}

// Whether the results of a query row are this task's, not a neighbouring one's.
bool owns(const Geometry& g, const Task& task, int64_t query) {
  const int64_t y = query * g.row_stride;
  return y >= task.begin && y < task.end;
}

// Probabilities and gradients of the logits of a band of queries, and the queries' gradients.
void query_band(const Attention& job, const Task& task, BackwardScratch& s, int64_t begin,
                int64_t rows) {
  const Geometry& g = job.g;
  const int64_t last = last_key_row(g, begin + rows - 1);
  stage_keys(g, job.key, job.position ? &job : nullptr, task, last, s.keys);
  stage_keys(g, job.value, nullptr, task, last, s.values);
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
      read_lse(job, task, n, begin + r, s.lse + r * g.query_pitch);
    }
    for_columns(g.out_width, AttendBackward{job, s, band, begin, n});
    for (int64_t r = 0; job.grad_alpha_by_row && r < rows; r++) {
      if (!owns(g, task, begin + r)) continue;
      alpha_gradient(job, task, n, begin + r, s.delta + r * g.query_pitch);
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

void key_band(const Attention& job, const Task& task, const BackwardScratch& s, int64_t begin,
              int64_t rows) {
  const Geometry& g = job.g;
  const int64_t count =
      share_queries(g, begin, rows, first_query_row(g, begin), last_query_row(g, begin + rows - 1),
                    s.gradient.shares);
  gather_keys(g, task, s.gradient, count, s.grad_logits, s.queries);
  for (int64_t r = 0; r < rows; r++) {
    const Rows sums = fold_columns(g, s.gradient, task.heads, r, job.alpha * kLn2);
    if (job.grad_position_by_row) position_gradient(job, task, begin + r, sums);
    store_keys(g, job.grad_key, task, begin + r, sums);
  }
  gather_keys(g, task, s.gradient, count, s.probabilities, s.grad_outs);
  for (int64_t r = 0; r < rows; r++) {
    store_keys(g, job.grad_value, task, begin + r,
               fold_columns(g, s.gradient, task.heads, r, job.alpha));
  }
}

void attention_backward(const Attention& job, int64_t index, float* memory) {
  const Geometry& g = job.g;
  const Task task = split(g, index, g.height);
  Scratch scratch(memory);
  BackwardScratch s(scratch, g);
  s.clear_rings(g);
  fill_offsets(s.weight_offset, g.window, g.query_pitch);
  s.gradient.list_taps(g);
  const int64_t first = first_query_row(g, task.begin), last = last_query_row(g, task.end - 1);
  s.keys.staged = s.values.staged = first_key_row(g, first);
  int64_t key = task.begin;
  for (int64_t begin = first; key < task.end; begin += kBand) {
    const int64_t rows = larger(0, smaller(kBand, last + 1 - begin));
    if (rows > 0) query_band(job, task, s, begin, rows);
    while (key < task.end) {
      const int64_t key_rows = smaller(kBand, task.end - key);
      if (last_query_row(g, key + key_rows - 1) >= begin + rows) break;
      key_band(job, task, s, key, key_rows);
      key += key_rows;
    }
  }
}

// Weighted aggregation: the weights are given.

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
    stage_keys(g, job.value, nullptr, task, last_key_row(g, begin + rows - 1), s.values);
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

  void clear_rings(const Geometry& g) {
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
  stage_keys(g, job.value, nullptr, task, last_key_row(g, begin + rows - 1), s.values);
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

void aggregation_backward(const Aggregation& job, int64_t index, float* memory) {
  const Geometry& g = job.g;
  const Task task = split(g, index, g.height);
  Scratch scratch(memory);
  AggregationBackwardScratch s(scratch, g);
  s.clear_rings(g);
  fill_offsets(s.weight_offset, g.window, g.query_pitch);
  s.gradient.list_taps(g);
  const int64_t first = first_query_row(g, task.begin), last = last_query_row(g, task.end - 1);
  s.values.staged = first_key_row(g, first);
  int64_t key = task.begin;
  for (int64_t begin = first; key < task.end; begin += kBand) {
    const int64_t rows = larger(0, smaller(kBand, last + 1 - begin));
    if (rows > 0) weight_band(job, task, s, begin, rows);
    while (key < task.end) {
      const int64_t key_rows = smaller(kBand, task.end - key);
      const int64_t last_user = last_query_row(g, key + key_rows - 1);
      if (last_user >= begin + rows) break;
      const int64_t count = share_queries(g, key, key_rows, first_query_row(g, key), last_user,
                                          s.gradient.shares);
      gather_keys(g, task, s.gradient, count, s.weights, s.grad_outs);
      for (int64_t r = 0; r < key_rows; r++) {
        store_keys(g, job.grad_value, task, key + r,
                   fold_columns(g, s.gradient, task.heads, r, 1.0f));
      }
      key += key_rows;
    }
  }
}

template <class S, class G = Geometry>
int64_t scratch_size(const G& g) {
  Scratch scratch(nullptr);
  S layout(scratch, g);
  return scratch.used();
}

}  // namespace

#define ACMIX_JOIN(a, b) a##b
#define ACMIX_TABLE(isa) ACMIX_JOIN(kernels_, isa)

const acmix::Kernels acmix::ACMIX_TABLE(ACMIX_ISA) = {
    scratch_size<ForwardScratch>,     attention_forward,
    scratch_size<BackwardScratch>,    attention_backward,
    scratch_size<AggregationScratch>, aggregation_forward,
    scratch_size<AggregationBackwardScratch>, aggregation_backward,
    scratch_size<ShiftForwardScratch, ShiftGeometry>, shift_forward,
    scratch_size<ShiftBackwardScratch, ShiftGeometry>, shift_backward,
    scratch_size<PartitionForwardScratch, PartitionGeometry>, partition_forward,
    scratch_size<PartitionBackwardScratch, PartitionGeometry>, partition_backward,
};
