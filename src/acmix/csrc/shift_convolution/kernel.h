// The shift convolution: outputs, gradients of the pieces and of the kernels.
// Only for kernels, see vec.h.
#pragma once

#include "shift_convolution/pairs.h"
#include "shift_convolution/planes.h"
#include "simd/correlate.h"
#include "simd/finite.h"
#include "simd/table.h"

namespace {

using acmix::Tap;

void stage_pieces(const Shift& job, const ShiftTask& task, const Planes& planes) {
  const ShiftGeometry& g = job.g;
  for (int64_t p = 0; p < g.phases; p++) {
    stage_planes(g, phase_pixels(g, job.pieces, g.phase[p]), task,
                 phase_planes(planes, p, g.pieces));
  }
}

// The pieces of all phases, and the inputs that they make.
struct ShiftInputs {
  Planes pieces, inputs;

  ShiftInputs(Scratch& s, const ShiftGeometry& g)
      : pieces(make_planes(s, g, g.phases * g.pieces)),
        inputs(g.combines ? make_planes(s, g, g.phases * g.inputs) : pieces) {}
};

// Zeros stay zeros, so that the inputs have their gaps; where they do not they are cleared.
void combine_pieces(const Shift& job, const ShiftTask& task, const ShiftInputs& s) {
  const ShiftGeometry& g = job.g;
  const int64_t whole = g.plane_pitch / kWide * kWide;
  for (int64_t n = 0; n < task.groups; n++) {
    for (int64_t p = 0; p < g.phases; p++) {
      float* inputs = phase_planes(s.inputs, p, g.inputs).group(n);
      correlate_all({phase_planes(s.pieces, p, g.pieces).group(n), g.plane_pitch, g.pieces,
                     &kNoShift, 1, job.combine, 1, g.pieces, inputs, g.plane_pitch, false},
                    g.inputs, whole);
      for (int64_t i = 0; i < g.inputs; i++) {
        clear(inputs + i * g.plane_pitch + whole, g.plane_pitch - whole);
      }
    }
  }
  if (all_finite(job.combine, g.inputs * g.pieces)) return;
  for (int64_t p = 0; p < g.phases; p++) {
    for_staged_rows(g, phase_pixels(g, job.pieces, g.phase[p]), task,
                    phase_planes(s.inputs, p, g.inputs), g.inputs,
                    [](int64_t, int64_t, int64_t) {});
  }
}

void stage_inputs(const Shift& job, const ShiftTask& task, const ShiftInputs& s) {
  stage_pieces(job, task, s.pieces);
  if (job.g.combines) combine_pieces(job, task, s);
}

int64_t weights_of_group(const ShiftGeometry& g) { return g.outputs * g.inputs * g.kernel; }

const float* group_weight(const Shift& job, const ShiftTask& task, int64_t n) {
  return job.weight + (task.group + n) * weights_of_group(job.g);
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
    correlate_all({s.in.inputs.group(n) + row_place(g, task, 0, 0), g.plane_pitch, g.inputs, g.tap,
                   g.taps, group_weight(job, task, n), g.kernel, g.inputs * g.kernel,
                   s.outs.group(n), g.plane_pitch, job.accumulate},
                  g.outputs, places(g, task));
  }
  store_results(g, job.out, task, s.outs);
}

struct ShiftBackwardScratch {
  ShiftInputs in;
  Planes grad_outs, grad_inputs, grad_pieces;
  float *tail, *before, *real;

  ShiftBackwardScratch(Scratch& s, const ShiftGeometry& g)
      : in(s, g),
        grad_outs(make_planes(s, g, g.outputs)),
        grad_inputs(make_planes(s, g, g.inputs)),
        grad_pieces(g.combines ? make_planes(s, g, g.pieces) : grad_inputs),
        tail(s.floats(g.outputs * kWide)),
        before(s.floats(g.inputs * g.pieces)),
        real(s.floats(g.plane_pitch)) {}
};

// Takes the sums that are not finite again, without the gaps: a zero there may meet an infinite
// input.
void exact_kernel_gradient(const Shift& job, const ShiftTask& task, const float* rows,
                           const float* source, float* sums) {
  const ShiftGeometry& g = job.g;
  for (int64_t m = 0; m < g.outputs; m++) {
    for (int64_t i = 0; i < g.inputs * g.taps; i++) {
      float& sum = sums[m * g.inputs * g.kernel + g.source[i].index];
      if (is_finite(sum)) continue;
      sum = 0.0f;
      const float *row = rows + m * g.plane_pitch, *from = source + g.source[i].offset;
      for_results(g, job.grad_out, task, [&](int64_t, int64_t, int64_t place) {
        for (int64_t n = place; n < place + g.out_width; n++) sum += row[n] * from[n];
      });
    }
  }
}

// Gradients of the kernels of group n, summed over the task's places. The gaps hold zeros.
void kernel_gradient(const Shift& job, const ShiftTask& task, const ShiftBackwardScratch& s,
                     int64_t n) {
  const ShiftGeometry& g = job.g;
  const int64_t size = g.inputs * g.kernel;
  float* sums = job.grad_weight + (task.part * g.groups + task.group + n) * g.outputs * size;
  clear(sums, g.outputs * size);
  const int64_t start = row_place(g, task, 0, 0), count = places(g, task);
  const int64_t whole = count / kWide * kWide;
  const float* rows = s.grad_outs.group(n) + start;
  const float* source = s.in.inputs.group(n) + start;
  pair_all({rows, g.plane_pitch, source, g.source, sums, size, whole}, g.outputs,
           g.inputs * g.taps);
  if (whole < count) {
    // The last places with zeros after them, as the planes have not: rows of the next chunk follow.
    for (int64_t m = 0; m < g.outputs; m++) {
      for (int64_t i = 0; i < kWide; i++) {
        s.tail[m * kWide + i] = whole + i < count ? rows[m * g.plane_pitch + whole + i] : 0.0f;
      }
    }
    pair_all({s.tail, kWide, source + whole, g.source, sums, size, kWide}, g.outputs,
             g.inputs * g.taps);
  }
  if (!all_finite(sums, g.outputs * size)) {
    exact_kernel_gradient(job, task, rows, source, sums);
  }
}

// Adds the gradients of the combination from group n, at the pixels of a phase. The gaps between
// the pieces hold zeros; those between the inputs' gradients need them only where something is not
// finite.
void combination_gradient(const Shift& job, const ShiftTask& task, const ShiftBackwardScratch& s,
                          int64_t n, int64_t phase, const Tensor& pixels, float* sums) {
  const ShiftGeometry& g = job.g;
  const int64_t count = places(g, task), whole = (count + kWide - 1) / kWide * kWide;
  const size_t size = static_cast<size_t>(g.inputs * g.pieces) * sizeof(float);
  float* rows = s.grad_inputs.group(n);
  for (int64_t i = 0; i < g.inputs; i++) clear(rows + i * g.plane_pitch + count, whole - count);
  const Pairing pairing{rows,
                        g.plane_pitch,
                        phase_planes(s.in.pieces, phase, g.pieces).group(n) +
                            row_place(g, task, 0, 0),
                        g.plane,
                        sums,
                        g.pieces,
                        whole};
  std::memcpy(s.before, sums, size);
  pair_all(pairing, g.inputs, g.pieces);
  if (all_finite(sums, g.inputs * g.pieces)) return;
  for (int64_t i = 0; i < g.inputs; i++) {
    clear_gaps(g, pixels, task, rows + i * g.plane_pitch, whole);
  }
  std::memcpy(sums, s.before, size);
  pair_all(pairing, g.inputs, g.pieces);
}

// Gradients of the inputs of group n at one phase of the stride.
void input_gradient(const Shift& job, const ShiftTask& task, const ShiftBackwardScratch& s,
                    int64_t n, int64_t phase, bool accumulate) {
  const ShiftGeometry& g = job.g;
  const int64_t begin = g.first_of_phase[phase], end = g.first_of_phase[phase + 1];
  correlate_all({s.grad_outs.group(n) + row_place(g, task, 0, 0), g.plane_pitch, g.outputs,
                 g.gradient_tap + begin, end - begin, group_weight(job, task, n),
                 g.inputs * g.kernel, g.kernel, s.grad_inputs.group(n), g.plane_pitch,
                 accumulate},
                g.inputs, places(g, task));
}

// The same without the gaps between the outputs' gradients, where weights are infinite or NaN.
void exact_input_gradient(const Shift& job, const ShiftTask& task, const ShiftBackwardScratch& s,
                          int64_t n, int64_t phase, const Tensor& pixels, bool accumulate) {
  const ShiftGeometry& g = job.g;
  const float *weight = group_weight(job, task, n), *grad_outs = s.grad_outs.group(n);
  const int64_t start = row_place(g, task, 0, 0);
  const auto gradient = [&](int64_t input, int64_t place) {
    float sum = 0.0f;
    for (int64_t t = g.first_of_phase[phase]; t < g.first_of_phase[phase + 1]; t++) {
      const Tap& tap = g.gradient_tap[t];
      const int64_t from = start + place + tap.offset;
      for (int64_t m = 0; s.real[from] != 0.0f && m < g.outputs; m++) {
        sum += weight[(m * g.inputs + input) * g.kernel + tap.index] *
               grad_outs[m * g.plane_pitch + from];
      }
    }
    return sum;
  };
  for (int64_t i = 0; i < g.inputs; i++) {
    float* out = s.grad_inputs.group(n) + i * g.plane_pitch;
    for_results(g, pixels, task, [&](int64_t, int64_t, int64_t place) {
      for (int64_t x = place; x < place + pixels.size[4]; x++) {
        out[x] = (accumulate ? out[x] : 0.0f) + gradient(i, x);
      }
    });
  }
}

// Ones where grad_out has an element, zeros in the gaps.
void mark_real(const Shift& job, const ShiftTask& task, float* real) {
  for_staged_rows(job.g, job.grad_out, task, {real, 0, 0}, 1,
                  [&](int64_t, int64_t, int64_t place) {
                    for (int64_t x = 0; x < job.g.out_width; x++) real[place + x] = 1.0f;
                  });
}

// Gradients of the pieces at one phase of the stride, and of their combination.
void piece_gradient(const Shift& job, const ShiftTask& task, const ShiftBackwardScratch& s,
                    int64_t phase, bool exact, float* combination) {
  const ShiftGeometry& g = job.g;
  const ShiftPhase first{phase / g.column_stride, phase % g.column_stride};
  const Tensor pixels = phase_pixels(g, job.grad_pieces, first);
  if (job.accumulate) load_results(g, pixels, task, s.grad_pieces);
  for (int64_t n = 0; n < task.groups; n++) {
    const bool accumulate = job.accumulate && !g.combines;
    if (exact) {
      exact_input_gradient(job, task, s, n, phase, pixels, accumulate);
    } else {
      input_gradient(job, task, s, n, phase, accumulate);
    }
    if (!g.combines) continue;
    correlate_all({s.grad_inputs.group(n), g.plane_pitch, g.inputs, &kNoShift, 1, job.combine,
                   g.pieces, 1, s.grad_pieces.group(n), g.plane_pitch, job.accumulate},
                  g.pieces, places(g, task));
    for (int64_t p = 0; combination && p < g.phases; p++) {
      if (g.phase[p].row != first.row || g.phase[p].column != first.column) continue;
      combination_gradient(job, task, s, n, p, pixels, combination);
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
  const bool exact = !all_finite(group_weight(job, task, 0), task.groups * weights_of_group(g));
  if (exact) mark_real(job, task, s.real);
  for (int64_t p = 0; p < g.row_stride * g.column_stride; p++) {
    piece_gradient(job, task, s, p, exact, combination);
  }
}

}  // namespace

const acmix::Kernels<Shift> acmix::ACMIX_KERNELS(shift) = {
    kernel<ShiftForwardScratch>(shift_forward), kernel<ShiftBackwardScratch>(shift_backward)};
