// Attention within the windows that a map is cut into.
#pragma once

#include "common/job.h"

namespace acmix {

struct PartitionProblem {
  int64_t batch, heads, channels, height, width;
  int64_t rows, columns;            // of a window; they divide the map's
  int64_t row_shift, column_shift;  // how far the map was rolled before it was cut
};

// Windows that a map is cut into, each for itself. In scratch a window's tokens are rows of
// `channel_pitch`, and matrices of a key a row have a query a lane, `pitch` of them.
struct PartitionGeometry {
  PartitionProblem p;
  int64_t tokens, down, across, pitch, channel_pitch;
  int64_t parts, part_rows;  // a part is some rows of windows, of all images one after another
};

struct Partition {
  PartitionGeometry g;
  Tensor query, key, value, out;
  Tensor grad_out, grad_query, grad_key, grad_value;
  const float* bias;  // [heads][key][query]
  float* lse;         // [batch][heads][down][across][tokens], base 2
  float* grad_bias;   // [parts][heads][key][query], to be summed, or null
  float scale;        // of the logits
};

ACMIX_DECLARE_KERNELS(Partition, partition);

}  // namespace acmix
