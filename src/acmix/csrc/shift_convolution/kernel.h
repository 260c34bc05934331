// The shift convolution: outputs, gradients of the pieces and of the kernels.
// Only for kernels, see vec.h.
#pragma once

#include "shift_convolution/job.h"
#include "shift_convolution/pairs.h"
#include "simd/correlate.h"
#include "simd/rows.h"
#include "simd/table.h"

namespace {

using acmix::Shift;
using acmix::ShiftGeometry;
using acmix::ShiftPhase;
using acmix::Tap;

// Some groups of some images, and the rows [begin, end) of outputs.
struct ShiftTask {
  int64_t image, images, group, groups, begin, end, part;

  int64_t rows() const { return end - begin; }
};

ShiftTask split(const ShiftGeometry& g, int64_t index) {
  const int64_t block = index % g.group_blocks, part = index / g.group_blocks;
  const int64_t chunk = part % g.chunks, images = part / g.chunks;
  return {images * g.images,
          smaller(g.images, g.batch - images * g.images),
          block * g.group_block,
          smaller(g.group_block, g.groups - block * g.group_block),
          chunk * g.row_chunk,
          smaller((chunk + 1) * g.row_chunk, g.out_height),
          part};
}

// The planes of a block of groups.
struct Planes {
  float* data;
  int64_t group_pitch, plane_pitch;
};

Planes make_planes(Scratch& scratch, const ShiftGeometry& g, int64_t planes) {
  const int64_t group_pitch = planes * g.plane_pitch;
  return {scratch.floats(g.group_block * group_pitch), group_pitch, g.plane_pitch};
}

// Where row `row` of an image's part of a plane begins; row 0 comes after the gap above it.
int64_t row_place(const ShiftGeometry& g, const ShiftTask& task, int64_t image, int64_t row) {
  return (image * (task.rows() + g.gap_y) + g.gap_y + row) * g.pitch + g.gap_x;
}

// Places from the first image's first to the last one's last.
int64_t places(const ShiftGeometry& g, const ShiftTask& task) {
  return (task.images * (task.rows() + g.gap_y) - g.gap_y) * g.pitch;
}

// The pixels of one phase, as a tensor.
Tensor phase_pixels(const ShiftGeometry& g, const Tensor& t, const ShiftPhase& phase) {
  return every(every(t, 3, phase.row, g.row_stride), 4, phase.column, g.column_stride);
}

template <class Body>
void for_planes(const Planes& planes, int64_t groups, int64_t count, const Body& body) {
  for (int64_t n = 0; n < groups; n++) {
    for (int64_t c = 0; c < count; c++) {
      body(planes.data + n * planes.group_pitch + c * planes.plane_pitch);
    }
  }
}

// A row of the tensor with zeros around it; all zeros beyond the tensor.
void stage_row(const ShiftGeometry& g, const Tensor& t, const ShiftTask& task, int64_t image,
               int64_t row, const Planes& planes) {
  const int64_t place = row_place(g, task, image, row), y = task.begin + row;
  const bool inside = y >= 0 && y < t.size[3];
  if (inside) {
    load_rows(t, task.image + image, task.group, task.groups, y,
              {planes.data + place, planes.group_pitch, planes.plane_pitch});
  }
  for_planes(planes, task.groups, t.size[2], [&](float* plane) {
    for (int64_t x = -g.gap_x; x < 0; x++) plane[place + x] = 0.0f;
    for (int64_t x = inside ? t.size[4] : 0; x < g.out_width; x++) plane[place + x] = 0.0f;
  });
}

void stage_planes(const ShiftGeometry& g, const Tensor& t, const ShiftTask& task,
                  const Planes& planes) {
  for (int64_t b = 0; b < task.images; b++) {
    const int64_t last = task.rows() + (b + 1 < task.images ? 0 : g.gap_y);
    for (int64_t row = -g.gap_y; row < last; row++) stage_row(g, t, task, b, row, planes);
  }
  const int64_t end = row_place(g, task, task.images - 1, task.rows() + g.gap_y) - g.gap_x;
  for_planes(planes, task.groups, t.size[2], [&](float* plane) {
    for (int64_t i = end; i < g.plane_pitch; i++) plane[i] = 0.0f;
  });
}

void stage_pieces(const Shift& job, const ShiftTask& task, const Planes& planes) {
  const ShiftGeometry& g = job.g;
  for (int64_t p = 0; p < g.phases; p++) {
    const Planes phase{planes.data + p * g.pieces * g.plane_pitch, planes.group_pitch,
                       planes.plane_pitch};
    stage_planes(g, phase_pixels(g, job.pieces, g.phase[p]), task, phase);
  }
}

// Rows of results: in planes without the gap before the first place.
Rows result_rows(const ShiftGeometry& g, const ShiftTask& task, int64_t image, int64_t row,
                 const Planes& planes) {
  const int64_t place = row_place(g, task, image, row) - row_place(g, task, 0, 0);
  return {planes.data + place, planes.group_pitch, planes.plane_pitch};
}

// Calls body(image, y, rows) for the rows of `t` that the task's results are.
template <class Body>
void for_results(const ShiftGeometry& g, const Tensor& t, const ShiftTask& task,
                 const Planes& planes, const Body& body) {
  for (int64_t b = 0; b < task.images; b++) {
    for (int64_t y = task.begin; y < smaller(task.end, t.size[3]); y++) {
      body(task.image + b, y, result_rows(g, task, b, y - task.begin, planes));
    }
  }
}

void load_results(const ShiftGeometry& g, const Tensor& t, const ShiftTask& task,
                  const Planes& planes) {
  for_results(g, t, task, planes, [&](int64_t image, int64_t y, Rows rows) {
    load_rows(t, image, task.group, task.groups, y, rows);
  });
}

void store_results(const ShiftGeometry& g, const Tensor& t, const ShiftTask& task,
                   const Planes& planes) {
  for_results(g, t, task, planes, [&](int64_t image, int64_t y, Rows rows) {
    store_rows(t, image, task.group, task.groups, y, rows);
  });
}

// The pieces of all phases, and the inputs that they make.
struct ShiftInputs {
  Planes pieces, inputs;

  ShiftInputs(Scratch& s, const ShiftGeometry& g)
      : pieces(make_planes(s, g, g.phases * g.pieces)),
        inputs(g.combines ? make_planes(s, g, g.phases * g.inputs) : pieces) {}
};

// Zeros stay zeros, so that the inputs have their gaps.
void combine_pieces(const Shift& job, const ShiftTask& task, const ShiftInputs& s) {
  const ShiftGeometry& g = job.g;
  const int64_t whole = g.plane_pitch / kWide * kWide;
  for (int64_t n = 0; n < task.groups; n++) {
    for (int64_t p = 0; p < g.phases; p++) {
      float* inputs = s.inputs.data + n * s.inputs.group_pitch + p * g.inputs * g.plane_pitch;
      correlate_all({s.pieces.data + n * s.pieces.group_pitch + p * g.pieces * g.plane_pitch,
                     g.plane_pitch, g.pieces, &kNoShift, 1, job.combine, 1, g.pieces, inputs,
                     g.plane_pitch, false},
                    g.inputs, whole);
      for (int64_t i = 0; i < g.inputs; i++) {
        clear(inputs + i * g.plane_pitch + whole, g.plane_pitch - whole);
      }
    }
  }
}

void stage_inputs(const Shift& job, const ShiftTask& task, const ShiftInputs& s) {
  stage_pieces(job, task, s.pieces);
  if (job.g.combines) combine_pieces(job, task, s);
}

struct ShiftForwardScratch {
  ShiftInputs in;
  Planes outs;

  ShiftForwardScratch(Scratch& s, const ShiftGeometry& g)
      : in(s, g), outs(make_planes(s, g, g.outputs)) {}
};

void shift_forward(const Shift& job, int64_t index, float* memory) {
  const ShiftGeometry& g = job.g;
  const ShiftTask task = split(g, index);
  Scratch scratch(memory);
  const ShiftForwardScratch s(scratch, g);
  stage_inputs(job, task, s.in);
  if (job.accumulate) load_results(g, job.out, task, s.outs);
  for (int64_t n = 0; n < task.groups; n++) {
    const float* weight = job.weight + (task.group + n) * g.outputs * g.inputs * g.kernel;
    correlate_all({s.in.inputs.data + n * s.in.inputs.group_pitch + row_place(g, task, 0, 0),
                   g.plane_pitch, g.inputs, g.tap, g.taps, weight, g.kernel,
                   g.inputs * g.kernel, s.outs.data + n * s.outs.group_pitch, g.plane_pitch,
                   job.accumulate},
                  g.outputs, places(g, task));
  }
  store_results(g, job.out, task, s.outs);
}

struct ShiftBackwardScratch {
  ShiftInputs in;
  Planes grad_outs, grad_inputs, grad_pieces;
  float* tail;

  ShiftBackwardScratch(Scratch& s, const ShiftGeometry& g)
      : in(s, g),
        grad_outs(make_planes(s, g, g.outputs)),
        grad_inputs(make_planes(s, g, g.inputs)),
        grad_pieces(g.combines ? make_planes(s, g, g.pieces) : grad_inputs),
        tail(s.floats(g.outputs * kWide)) {}
};

// Places of one pass over the sources: those of a few inputs stay in the first-level cache.
constexpr int64_t kSegment = 1024;

// Gradients of the kernels of group n, summed over the task's places. The gaps hold zeros.
void kernel_gradient(const Shift& job, const ShiftTask& task, const ShiftBackwardScratch& s,
                     int64_t n) {
  const ShiftGeometry& g = job.g;
  const int64_t size = g.inputs * g.kernel;
  float* sums = job.grad_weight + (task.part * g.groups + task.group + n) * g.outputs * size;
  clear(sums, g.outputs * size);
  const int64_t start = row_place(g, task, 0, 0), count = places(g, task);
  const int64_t whole = count / kWide * kWide;
  const float* rows = s.grad_outs.data + n * s.grad_outs.group_pitch + start;
  const float* source = s.in.inputs.data + n * s.in.inputs.group_pitch + start;
  for (int64_t at = 0; at < whole; at += kSegment) {
    pair_all({rows + at, g.plane_pitch, source + at, g.source, sums, size,
              smaller(kSegment, whole - at)},
             g.outputs, g.inputs * g.taps);
  }
  if (whole == count) return;
  // The last places with zeros after them, as the planes have not: rows of the next chunk follow.
  for (int64_t m = 0; m < g.outputs; m++) {
    for (int64_t i = 0; i < kWide; i++) {
      s.tail[m * kWide + i] = whole + i < count ? rows[m * g.plane_pitch + whole + i] : 0.0f;
    }
  }
  pair_all({s.tail, kWide, source + whole, g.source, sums, size, kWide}, g.outputs,
           g.inputs * g.taps);
}

// Adds the gradients of the combination from group n, at the pixels of a phase.
void combination_gradient(const Shift& job, const ShiftTask& task, const ShiftBackwardScratch& s,
                          int64_t n, int64_t phase, float* sums) {
  const ShiftGeometry& g = job.g;
  const int64_t count = places(g, task), whole = (count + kWide - 1) / kWide * kWide;
  float* rows = s.grad_inputs.data + n * s.grad_inputs.group_pitch;
  for (int64_t i = 0; i < g.inputs; i++) clear(rows + i * g.plane_pitch + count, whole - count);
  const float* source = s.in.pieces.data + n * s.in.pieces.group_pitch +
                        phase * g.pieces * g.plane_pitch + row_place(g, task, 0, 0);
  for (int64_t at = 0; at < whole; at += kSegment) {
    pair_all({rows + at, g.plane_pitch, source + at, g.plane, sums, g.pieces,
              smaller(kSegment, whole - at)},
             g.inputs, g.pieces);
  }
}

// Gradients of the inputs of group n at one phase of the stride.
void input_gradient(const Shift& job, const ShiftTask& task, const ShiftBackwardScratch& s,
                    int64_t n, int64_t phase, bool accumulate) {
  const ShiftGeometry& g = job.g;
  const int64_t begin = g.first_of_phase[phase], end = g.first_of_phase[phase + 1];
  const float* weight = job.weight + (task.group + n) * g.outputs * g.inputs * g.kernel;
  correlate_all({s.grad_outs.data + n * s.grad_outs.group_pitch + row_place(g, task, 0, 0),
                 g.plane_pitch, g.outputs, g.gradient_tap + begin, end - begin, weight,
                 g.inputs * g.kernel, g.kernel,
                 s.grad_inputs.data + n * s.grad_inputs.group_pitch, g.plane_pitch, accumulate},
                g.inputs, places(g, task));
}

// Gradients of the pieces at one phase of the stride, and of their combination.
void piece_gradient(const Shift& job, const ShiftTask& task, const ShiftBackwardScratch& s,
                    int64_t phase, float* combination) {
  const ShiftGeometry& g = job.g;
  const ShiftPhase first{phase / g.column_stride, phase % g.column_stride};
  const Tensor pixels = phase_pixels(g, job.grad_pieces, first);
  if (job.accumulate) load_results(g, pixels, task, s.grad_pieces);
  for (int64_t n = 0; n < task.groups; n++) {
    input_gradient(job, task, s, n, phase, job.accumulate && !g.combines);
    if (!g.combines) continue;
    correlate_all({s.grad_inputs.data + n * s.grad_inputs.group_pitch, g.plane_pitch, g.inputs,
                   &kNoShift, 1, job.combine, g.pieces, 1,
                   s.grad_pieces.data + n * s.grad_pieces.group_pitch, g.plane_pitch,
                   job.accumulate},
                  g.pieces, places(g, task));
    for (int64_t p = 0; combination && p < g.phases; p++) {
      if (g.phase[p].row != first.row || g.phase[p].column != first.column) continue;
      combination_gradient(job, task, s, n, p, combination);
    }
  }
  store_results(g, pixels, task, s.grad_pieces);
}

void shift_backward(const Shift& job, int64_t index, float* memory) {
  const ShiftGeometry& g = job.g;
  const ShiftTask task = split(g, index);
  Scratch scratch(memory);
  const ShiftBackwardScratch s(scratch, g);
  stage_planes(g, job.grad_out, task, s.grad_outs);
  float* combination = nullptr;
  if (job.grad_weight) {
    stage_inputs(job, task, s.in);
    for (int64_t n = 0; n < task.groups; n++) kernel_gradient(job, task, s, n);
    combination = g.combines ? job.grad_combine + index * g.inputs * g.pieces : nullptr;
    if (combination) clear(combination, g.inputs * g.pieces);
  }
  for (int64_t p = 0; p < g.row_stride * g.column_stride; p++) {
    piece_gradient(job, task, s, p, combination);
  }
}

}  // namespace

const acmix::Kernels<Shift> acmix::ACMIX_KERNELS(shift) = {
    kernel<ShiftForwardScratch>(shift_forward), kernel<ShiftBackwardScratch>(shift_backward)};
