// The C interface of the shift convolution.

#include <vector>

#include "api/arithmetic.h"
#include "api/run.h"
#include "shift_convolution/job.h"
#include "sliding/geometry.h"

namespace acmix {
namespace {

constexpr const Kernels<Shift>* kVariants[] = ACMIX_VARIANTS(shift);

// The tables behind the geometry of a shift convolution.
struct ShiftTables {
  std::vector<ShiftPhase> phases;
  std::vector<Tap> taps, sources, planes, gradient_taps;
  std::vector<int64_t> first_of_phase;
};

// Calls body(row, column, index) for the taps of the kernel that reach the map from somewhere, with
// their distance in pixels.
template <class Body>
void for_shift_taps(const ShiftProblem& p, const Body& body) {
  const int64_t radius = p.window / 2;
  const auto reach = [&](int64_t size) {
    return radius < (size - 1) / p.dilation ? radius : (size - 1) / p.dilation;
  };
  const int64_t rows = reach(p.height), columns = reach(p.width);
  for (int64_t a = -rows; a <= rows; a++) {
    for (int64_t b = -columns; b <= columns; b++) {
      body(a * p.dilation, b * p.dilation, (a + radius) * p.window + b + radius);
    }
  }
}

int64_t phase_number(std::vector<ShiftPhase>& phases, int64_t row, int64_t column) {
  for (size_t i = 0; i < phases.size(); i++) {
    if (phases[i].row == row && phases[i].column == column) return static_cast<int64_t>(i);
  }
  phases.push_back({row, column});
  return static_cast<int64_t>(phases.size()) - 1;
}

// The tap `distance` pixels away reads the pixels of this phase.
int64_t phase_of(int64_t distance, int64_t stride) {
  return distance - floor_div(distance, stride) * stride;
}

void fill_phases(ShiftGeometry& g, const ShiftProblem& p, ShiftTables& tables) {
  for_shift_taps(p, [&](int64_t row, int64_t column, int64_t) {
    phase_number(tables.phases, phase_of(row, g.row_stride), phase_of(column, g.column_stride));
    const int64_t rows = ceil_div(row > 0 ? row : 0, g.row_stride);
    const int64_t columns = ceil_div(column > 0 ? column : 0, g.column_stride);
    if (rows > g.gap_y) g.gap_y = rows;
    if (columns > g.gap_x) g.gap_x = columns;
  });
  g.pitch = g.out_width + g.gap_x;
  g.phases = static_cast<int64_t>(tables.phases.size());
  g.phase = tables.phases.data();
}

void fill_shift_taps(ShiftGeometry& g, const ShiftProblem& p, ShiftTables& tables) {
  for_shift_taps(p, [&](int64_t row, int64_t column, int64_t index) {
    const int64_t i = floor_div(row, g.row_stride), j = floor_div(column, g.column_stride);
    const int64_t phase = phase_number(tables.phases, phase_of(row, g.row_stride),
                                       phase_of(column, g.column_stride));
    tables.taps.push_back({phase * g.inputs * g.plane_pitch + i * g.pitch + j, index});
  });
  for (int64_t input = 0; input < g.inputs; input++) {
    for (const Tap& tap : tables.taps) {
      tables.sources.push_back(
          {input * g.plane_pitch + tap.offset, input * g.kernel + tap.index});
    }
  }
  for (int64_t i = 0; i < g.pieces; i++) tables.planes.push_back({i * g.plane_pitch, i});
}

void fill_gradient_taps(const ShiftGeometry& g, const ShiftProblem& p, ShiftTables& tables) {
  for (int64_t y = 0; y < g.row_stride; y++) {
    for (int64_t x = 0; x < g.column_stride; x++) {
      tables.first_of_phase.push_back(static_cast<int64_t>(tables.gradient_taps.size()));
      for_shift_taps(p, [&](int64_t row, int64_t column, int64_t index) {
        if ((y - row) % g.row_stride != 0 || (x - column) % g.column_stride != 0) return;
        const int64_t i = (y - row) / g.row_stride, j = (x - column) / g.column_stride;
        tables.gradient_taps.push_back({i * g.pitch + j, index});
      });
    }
  }
  tables.first_of_phase.push_back(static_cast<int64_t>(tables.gradient_taps.size()));
}

// Groups whose pixels share cache lines are staged together.
int64_t group_block(const ShiftProblem& p, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors) {
    if (t->data && t->stride[4] != 1) return p.groups < 4 ? p.groups : 4;
  }
  return 1;
}

// What a task stages should stay in the second-level cache; small images go together, since ends of
// rows of places cost. No word of threads: gradients of the kernels are summed task by task.
void set_shift_tasks(ShiftGeometry& g, int64_t planes) {
  constexpr double cache = 128 * 1024;
  constexpr int64_t enough_places = 1024;
  const double row = static_cast<double>(g.group_block * planes) * static_cast<double>(g.pitch);
  const int64_t affordable = static_cast<int64_t>(cache / row);
  const int64_t smallest = 8 + 2 * g.gap_y;
  const int64_t wanted = affordable > smallest ? affordable : smallest;
  g.chunks = ceil_div(g.out_height, wanted);
  g.row_chunk = ceil_div(g.out_height, g.chunks);
  g.chunks = ceil_div(g.out_height, g.row_chunk);
  const int64_t rows = g.row_chunk + g.gap_y;
  int64_t images = enough_places / (rows * g.pitch);
  if (images > affordable / rows) images = affordable / rows;
  if (images > g.batch) images = g.batch;
  g.images = g.chunks > 1 || images < 1 ? 1 : images;
  g.image_blocks = ceil_div(g.batch, g.images);
  const int64_t places = (g.images * rows + g.gap_y) * g.pitch;
  g.plane_pitch = spread(places + 2 * g.gap_x + 16);
}

ShiftGeometry make_shift_geometry(const ShiftProblem& p, bool combines, int64_t block,
                                  ShiftTables& tables) {
  ShiftGeometry g{};
  g.combines = combines;
  g.pieces = p.pieces;
  g.batch = p.batch;
  g.groups = p.groups;
  g.inputs = p.inputs;
  g.outputs = p.outputs;
  g.height = p.height;
  g.width = p.width;
  g.out_height = ceil_div(p.height, p.stride);
  g.out_width = ceil_div(p.width, p.stride);
  g.row_stride = p.stride < p.height ? p.stride : p.height;  // longer steps are all alike
  g.column_stride = p.stride < p.width ? p.stride : p.width;
  g.kernel = p.window * p.window;
  g.group_block = block;
  g.group_blocks = ceil_div(p.groups, block);
  fill_phases(g, p, tables);
  set_shift_tasks(g, (g.phases + 1) * (g.inputs + (combines ? g.pieces : 0)) + g.outputs);
  fill_shift_taps(g, p, tables);
  fill_gradient_taps(g, p, tables);
  g.taps = static_cast<int64_t>(tables.taps.size());
  g.tap = tables.taps.data();
  g.source = tables.sources.data();
  g.plane = tables.planes.data();
  g.gradient_tap = tables.gradient_taps.data();
  g.first_of_phase = tables.first_of_phase.data();
  return g;
}

// The map that the convolution's window slides over.
Problem sliding(const ShiftProblem& p) {
  return {p.batch, p.groups, p.pieces, p.height, p.width, p.window, p.stride, p.dilation};
}

bool sane(const ShiftProblem& p, const float* combine) {
  if (!sane_sizes({p.groups, p.pieces, p.inputs, p.outputs}) || !sane(sliding(p))) return false;
  const double kernels = static_cast<double>(p.groups) * static_cast<double>(p.outputs) *
                         static_cast<double>(p.inputs) * static_cast<double>(p.window);
  return kernels * static_cast<double>(p.window) < 1e12 && (combine || p.pieces == p.inputs);
}

bool affordable(const ShiftGeometry& g) {
  const double planes =
      static_cast<double>(g.phases + 1) * static_cast<double>(g.inputs + g.pieces) +
      static_cast<double>(g.outputs);
  return planes * static_cast<double>(g.plane_pitch) * static_cast<double>(g.group_block) < 1e11;
}

int run(const Shift& job, const Kernel<Shift>& kernel, int64_t threads) {
  if (!affordable(job.g)) return kNoMemory;
  return run(job, kernel, job.g.image_blocks * job.g.chunks * job.g.group_blocks, threads);
}

// What both passes are given.
Shift make_job(const ShiftProblem& p, const Tensor& pieces, const float* combine,
               const float* weight) {
  Shift job{};
  job.pieces = pieces;
  job.combine = combine;
  job.weight = weight;
  job.accumulate = p.accumulate != 0;
  return job;
}

// Adds what follows from the sizes; the job keeps pointers into the tables.
void make_tables(const ShiftProblem& p, Shift& job, ShiftTables& tables) {
  const int64_t block =
      group_block(p, {&job.pieces, &job.out, &job.grad_out, &job.grad_pieces});
  job.g = make_shift_geometry(p, job.combine != nullptr, block, tables);
}

// Adds up `parts`, each as long as `sum`.
void sum_parts(const std::vector<float>& parts, float* sum, size_t size) {
  for (size_t i = 0; i < size; i++) sum[i] = 0.0f;
  for (size_t i = 0; i < parts.size(); i++) sum[i % size] += parts[i];
}

// Fills the sums of the gradients too.
int run_backward(const ShiftProblem& p, Shift& job, float* grad_weight, float* grad_combine,
                 int64_t threads) {
  ShiftTables tables;
  make_tables(p, job, tables);
  const ShiftGeometry& g = job.g;
  const size_t size = static_cast<size_t>(g.groups * g.outputs * g.inputs * g.kernel);
  const size_t parts = static_cast<size_t>(g.image_blocks * g.chunks);
  std::vector<float> others(grad_weight && parts != 1 ? parts * size : 0);
  job.grad_weight = parts == 1 ? grad_weight : others.data();
  const size_t pairs = static_cast<size_t>(g.inputs * g.pieces);
  std::vector<float> combinations(
      g.combines && grad_weight ? parts * static_cast<size_t>(g.group_blocks) * pairs : 0);
  job.grad_combine = combinations.data();
  const int status = run(job, kernels_of(kVariants).backward, threads);
  if (grad_weight && parts != 1) sum_parts(others, grad_weight, size);
  if (grad_combine && grad_weight) sum_parts(combinations, grad_combine, pairs);
  return status;
}

}  // namespace

// `combine` is null where the pieces are the inputs.
ACMIX_EXPORT int acmix_shift_forward(const ShiftProblem* p, const Tensor* pieces,
                                     const float* combine, const float* weight, const Tensor* out,
                                     int64_t threads) {
  if (!sane(*p, combine)) return kBadProblem;
  if (!fit({pieces}, pixel_size(sliding(*p), p->pieces)) ||
      !fit({out}, window_size(sliding(*p), p->outputs)) || !weight) {
    return kBadTensor;
  }
  return guarded([&] {
    Shift job = make_job(*p, *pieces, combine, weight);
    job.out = *out;
    ShiftTables tables;
    make_tables(*p, job, tables);
    return run(job, kernels_of(kVariants).forward, threads);
  });
}

ACMIX_EXPORT int acmix_shift_backward(const ShiftProblem* p, const Tensor* grad_out,
                                      const Tensor* pieces, const float* combine,
                                      const float* weight, const Tensor* grad_pieces,
                                      float* grad_weight, float* grad_combine, int64_t threads) {
  if (!sane(*p, combine)) return kBadProblem;
  if (!fit({pieces, grad_pieces}, pixel_size(sliding(*p), p->pieces)) ||
      !fit({grad_out}, window_size(sliding(*p), p->outputs)) || !weight) {
    return kBadTensor;
  }
  return guarded([&] {
    Shift job = make_job(*p, *pieces, combine, weight);
    job.grad_out = *grad_out;
    job.grad_pieces = *grad_pieces;
    return run_backward(*p, job, grad_weight, grad_combine, threads);
  });
}

}  // namespace acmix
