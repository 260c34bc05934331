#include "sliding/geometry.h"

#include "api/arithmetic.h"
#include "sliding/reflect.h"

namespace acmix {
namespace {

// Reflection repeats after 2 (size - 1) rows, so a larger dilation equals its remainder.
int64_t reduced(int64_t dilation, int64_t size) {
  return size == 1 ? 0 : dilation % (2 * (size - 1));
}

void fill_columns(Geometry& g, Tables& tables) {
  const int64_t out16 = round_up(g.out_width, 16);
  const int64_t reach = 2 * g.column_pad / g.column_stride;
  const int64_t phase_width = ceil_div(g.padded_width, g.column_stride);
  const int64_t needed = out16 + reach > round_up(phase_width, 16) ? out16 + reach
                                                                   : round_up(phase_width, 16);
  g.phase_pitch = g.column_stride == 1 ? spread(needed) : round_up(needed, 16);
  g.key_pitch = g.column_stride == 1 ? g.phase_pitch : spread(g.column_stride * g.phase_pitch);
  g.query_margin = reach > 16 ? round_up(reach, 16) : round_up(reach, 8);
  g.query_pitch = spread(g.query_margin + round_up(phase_width, 16));
  g.unit_taps = true;
  for (int64_t b = 0; b < g.window; b++) {
    tables.tap_offset.push_back(key_place(g, b * g.column_dilation));
    g.unit_taps = g.unit_taps && tables.tap_offset.back() == b;
  }
  for (int64_t p = 0; p < g.column_stride; p++) {
    const int64_t column = (p - g.column_pad % g.column_stride + g.column_stride) % g.column_stride;
    tables.phases.push_back({column, key_place(g, column + g.column_pad)});
  }
  for (int64_t padded = 0; padded < g.padded_width; padded++) {
    const int64_t column = padded - g.column_pad, source = reflect(column, g.width);
    if (source == column) continue;
    tables.edges.push_back({key_place(g, padded), key_place(g, source + g.column_pad)});
  }
}

// Heads whose values lie side by side in some tensor are staged together, four at most.
int64_t head_group(const Problem& p, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors) {
    if (t->data && t->stride[4] != 1 && t->stride[2] != 1 && t->stride[1] == 1) {
      return p.heads < 4 ? p.heads : 4;
    }
  }
  return 1;
}

}  // namespace

bool sane(const Problem& p) {
  return sane_sizes({p.heads, p.channels, p.height, p.width, p.stride, p.dilation}) &&
         p.batch >= 0 && p.batch <= kLargest && p.window >= 1 && p.window % 2 == 1 &&
         p.window <= kLargestWindow;
}

Size pixel_size(const Problem& p, int64_t planes) {
  return {p.batch, p.heads, planes, p.height, p.width};
}

Size window_size(const Problem& p, int64_t planes) {
  return {p.batch, p.heads, planes, ceil_div(p.height, p.stride), ceil_div(p.width, p.stride)};
}

int64_t key_place(const Geometry& g, int64_t padded) {
  return padded % g.column_stride * g.phase_pitch + padded / g.column_stride;
}

Geometry make_geometry(const Problem& p, std::initializer_list<const Tensor*> tensors,
                       Tables& tables) {
  Geometry g{};
  g.batch = p.batch;
  g.heads = p.heads;
  g.channels = p.channels;
  g.height = p.height;
  g.width = p.width;
  g.out_height = ceil_div(p.height, p.stride);
  g.out_width = ceil_div(p.width, p.stride);
  g.row_stride = g.out_height > 1 ? p.stride : 1;  // a single row takes no steps
  g.column_stride = g.out_width > 1 ? p.stride : 1;
  g.window = p.window;
  g.taps = p.window * p.window;
  g.radius = p.window / 2;
  g.row_dilation = reduced(p.dilation, p.height);
  g.column_dilation = reduced(p.dilation, p.width);
  g.column_pad = g.radius * g.column_dilation;
  g.padded_width = g.width + 2 * g.column_pad;
  fill_columns(g, tables);
  g.tap_offset = tables.tap_offset.data();
  g.phase = tables.phases.data();
  g.edge = tables.edges.data();
  g.edges = static_cast<int64_t>(tables.edges.size());
  const int64_t reach = 2 * g.radius * g.row_dilation;
  const int64_t key_rows = reach + (kBand - 1) * g.row_stride + 1;
  const int64_t query_rows = (reach + kBand - 1) / g.row_stride + 2 + kBand;
  g.key_ring = key_rows < g.height ? key_rows : g.height;
  g.query_ring = query_rows < g.out_height ? query_rows : g.out_height;
  g.head_group = head_group(p, tensors);
  g.groups = ceil_div(g.heads, g.head_group);
  return g;
}

void set_chunks(Geometry& g, int64_t rows, int64_t threads) {
  const int64_t whole = g.batch * g.groups;
  const int64_t wanted = threads > 1 ? ceil_div(4 * threads, whole > 0 ? whole : 1) : 1;
  const int64_t smallest = g.window + 2 * kBand;
  const int64_t chunk = ceil_div(rows, wanted);
  g.row_chunk = round_up(chunk > smallest ? chunk : smallest, kBand);
  g.chunks = ceil_div(rows, g.row_chunk);
}

int64_t count_tasks(const Geometry& g) { return g.batch * g.groups * g.chunks; }

bool affordable(const Geometry& g) {
  const double rows = static_cast<double>(g.key_ring) * static_cast<double>(g.key_pitch) +
                      static_cast<double>(g.query_ring) * static_cast<double>(g.query_pitch);
  const double planes = static_cast<double>(g.channels) + static_cast<double>(g.taps);
  return rows * planes * static_cast<double>(g.head_group) < 1e11;
}

}  // namespace acmix
