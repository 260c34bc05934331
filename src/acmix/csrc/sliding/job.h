// What a job with sliding windows is about: sizes, and the tables derived from them.
#pragma once

#include "common/job.h"

namespace acmix {

struct Problem {
  int64_t batch, heads, channels, height, width, window, stride, dilation;
};

// The columns of one phase of the stride: from which on, and where the first is in a key row.
struct ColumnPhase {
  int64_t column, place;
};

// A reflected column: its place in a key row, and that of the column it reflects.
struct Edge {
  int64_t to, from;
};

// Rows of queries and keys live in scratch as float32 [channel][column].
// A key row holds its reflected columns too, split by column modulo the stride ("phase"), so that the
// neighbours of consecutive queries are consecutive: tap b of query j is at tap_offset[b] + j.
// A query row has zeros around it, so that a key may gather from queries that do not exist.
struct Geometry {
  int64_t batch, heads, channels, height, width, out_height, out_width;
  int64_t window, taps, radius, row_stride, column_stride, row_dilation, column_dilation;
  int64_t column_pad, padded_width, phase_pitch, key_pitch;
  int64_t query_margin, query_pitch;
  int64_t key_ring, query_ring;
  int64_t head_group, groups, row_chunk, chunks;
  const int64_t* tap_offset;   // [window]
  const ColumnPhase* phase;    // [column_stride]
  const Edge* edge;            // [edges]
  int64_t edges;
  bool unit_taps;              // tap_offset[b] == b
};

}  // namespace acmix
