// What tasks with sliding windows do by bands of rows: which rows a band meets, key rows staged in
// a ring, the products of a band with them. Only for kernels, see vec.h.
#pragma once

#include "simd/rows.h"
#include "simd/scratch.h"
#include "sliding/job.h"
#include "sliding/products.h"
#include "sliding/reflect.h"

namespace {

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

// Rows up to `last`; then calls finish(rows, y) with each of them.
template <class Finish>
void stage_keys(const Geometry& g, const Tensor& tensor, const Task& task, int64_t last,
                KeyRows& keys, const Finish& finish) {
  for (; keys.staged <= last; keys.staged++) {
    const Rows rows = keys.ring.rows(keys.staged, 0);
    for_phases(g, tensor, rows, [&](const Tensor& columns, Rows places) {
      load_rows(columns, task.batch, task.head, task.heads, keys.staged, places);
    });
    for_rows(g, task.heads, rows, [&](float* row, int64_t, int64_t) {
      for (int64_t i = 0; i < g.edges; i++) row[g.edge[i].to] = row[g.edge[i].from];
    });
    finish(rows, keys.staged);
  }
}

void stage_values(const Geometry& g, const Tensor& tensor, const Task& task, int64_t last,
                  KeyRows& values) {
  stage_keys(g, tensor, task, last, values, [](Rows, int64_t) {});
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

}  // namespace
