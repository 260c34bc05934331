// The convolution of pieces, group by group, or of combinations of them.
#pragma once

#include "common/job.h"

namespace acmix {

// In each of `groups` groups: pieces, combined pixel by pixel to as many inputs or taken as they are,
// and the convolution of the inputs to outputs.
struct ShiftProblem {
  int64_t batch, groups, pieces, inputs, outputs, height, width, window, stride, dilation;
  int64_t accumulate;  // whether results are added to what the tensors hold
};

// Planes in scratch are zero-padded rows of one pitch, end to end, of one image or of several small
// ones: `gap_x` zeros before each row serve the row before it too, `gap_y` rows of them above each
// image the image above. So a vector of outputs may cross rows, and only the gaps between them are
// computed in vain. An input plane holds the pixels of one phase of the stride.
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
  const Tap* tap;            // [taps], those that reach the map from somewhere
  const Tap* source;         // [inputs * taps]
  const Tap* plane;          // [pieces]
  // By phase of the input, row by row and all of them: from a pixel to the outputs that it is for.
  const Tap* gradient_tap;
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

ACMIX_DECLARE_KERNELS(Shift, shift);

}  // namespace acmix
