// What one call of the kernel is about: tensors, sizes and the tables derived from them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace acmix {

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// A (batch, heads, channels, rows, columns) tensor in any layout; strides count elements.
struct Tensor {
  void* data;
  int64_t extent;  // elements from `data` to the end of its storage
  int64_t size[5];
  int64_t stride[5];
  int32_t dtype;
};

struct Problem {
  int64_t batch, heads, channels, height, width, window, stride, dilation;
};

// In each of `groups` groups: pieces, combined pixel by pixel to as many inputs or taken as they are,
// and the convolution of the inputs to outputs.
struct ShiftProblem {
  int64_t batch, groups, pieces, inputs, outputs, height, width, window, stride, dilation;
  int64_t accumulate;  // whether results are added to what the tensors hold
};

// At most this many rows share one load of a neighbour's row.
constexpr int kBand = 3;

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

struct Attention {
  Geometry g;
  Tensor query, key, value, out;
  Tensor grad_out, grad_query, grad_key, grad_value;
  const float* position;  // [channels][2] or null
  const float* column_location;  // [key_pitch]
  const float* row_location;     // [height]
  float* lse;                    // [batch][heads][out_height][out_width], base 2
  float* grad_position_by_row;   // [batch][heads][height][channels][2] or null
  float* grad_alpha_by_row;      // [batch][heads][out_height] or null
  float scale;                   // of the logits
  float alpha;                   // factor of the outputs
};

struct Aggregation {
  Geometry g;
  Tensor weight, value, out;
  Tensor grad_out, grad_weight, grad_value;
};

// Planes in scratch are zero-padded rows of one pitch, end to end, of one image or of several small
// ones: `gap_x` zeros before each row serve the row before it too, `gap_y` rows of them above each
// image the image above. So a vector of outputs may cross rows, and only the gaps between them are
// computed in vain. An input plane holds the pixels of one phase of the stride.
struct ShiftTap {
  int64_t offset;  // from an output's place in its plane to that of its input
  int64_t index;   // in the kernel
};

struct ShiftPhase {
  int64_t row, column;  // of the first pixel
};

struct ShiftGeometry {
  int64_t batch, groups, pieces, inputs, outputs, height, width, out_height, out_width;
  int64_t kernel, row_stride, column_stride;  // kernel: taps of the whole one
  int64_t gap_y, gap_x, pitch, plane_pitch;
  int64_t group_block, group_blocks, row_chunk, chunks, images, image_blocks;
  int64_t phases, taps;
  bool combines;             // whether inputs are combinations of pieces
  const ShiftPhase* phase;   // [phases], those that taps reach
  const ShiftTap* tap;       // [taps], those that reach the map from somewhere
  const ShiftTap* source;    // [inputs * taps]
  const ShiftTap* plane;     // [pieces]
  // By phase of the input, row by row and all of them: from a pixel to the outputs that it is for.
  const ShiftTap* gradient_tap;
  const int64_t* first_of_phase;  // [row_stride * column_stride + 1]
};

struct Shift {
  ShiftGeometry g;
  Tensor pieces, out;  // (batch, groups, pieces or outputs, rows, columns)
  Tensor grad_out, grad_pieces;
  const float* combine;  // [inputs][pieces], null where the pieces are the inputs
  float* grad_combine;   // the same for each task, to be summed
  const float* weight;  // [groups][outputs][inputs][kernel]
  float* grad_weight;   // the same for each block of images and chunk of rows, to be summed
  bool accumulate;
};

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

// The entry points of one instruction set. Sizes of scratch are in floats.
struct Kernels {
  int64_t (*attention_forward_scratch)(const Geometry&);
  void (*attention_forward)(const Attention&, int64_t task, float* scratch);
  int64_t (*attention_backward_scratch)(const Geometry&);
  void (*attention_backward)(const Attention&, int64_t task, float* scratch);
  int64_t (*aggregation_forward_scratch)(const Geometry&);
  void (*aggregation_forward)(const Aggregation&, int64_t task, float* scratch);
  int64_t (*aggregation_backward_scratch)(const Geometry&);
  void (*aggregation_backward)(const Aggregation&, int64_t task, float* scratch);
  int64_t (*shift_forward_scratch)(const ShiftGeometry&);
  void (*shift_forward)(const Shift&, int64_t task, float* scratch);
  int64_t (*shift_backward_scratch)(const ShiftGeometry&);
  void (*shift_backward)(const Shift&, int64_t task, float* scratch);
  int64_t (*partition_forward_scratch)(const PartitionGeometry&);
  void (*partition_forward)(const Partition&, int64_t task, float* scratch);
  int64_t (*partition_backward_scratch)(const PartitionGeometry&);
  void (*partition_backward)(const Partition&, int64_t task, float* scratch);
};

extern const Kernels kernels_plain;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

}  // namespace acmix
