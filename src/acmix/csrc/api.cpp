// The library's C interface: checks every size it is given, derives the geometry, runs the tasks.

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <vector>

#include "job.h"
#include "pool.h"

#if defined(_WIN32)
#define ACMIX_EXPORT extern "C" __declspec(dllexport)
#else
#define ACMIX_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace acmix {
namespace {

enum Status : int { kOk = 0, kBadProblem = 1, kBadTensor = 2, kNoMemory = 3 };

struct Simd {
  const char* name;
  const Kernels* kernels;
};

// The widest instruction set of this machine that ACMIX_SIMD, where set, allows.
Simd choose_simd() {
#if defined(ACMIX_X86_VARIANTS)
  const char* wish = std::getenv("ACMIX_SIMD");
  const bool plain = wish && std::strcmp(wish, "plain") == 0;
  const bool narrow = plain || (wish && std::strcmp(wish, "avx2") == 0);
  __builtin_cpu_init();
  if (!narrow && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return {"avx512", &kernels_avx512};
  }
  if (!plain && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {"avx2", &kernels_avx2};
  }
#endif
#if defined(__aarch64__) && defined(__GNUC__)
  return {"neon", &kernels_plain};
#else
  return {"plain", &kernels_plain};
#endif
}

const Simd& simd() {
  static const Simd chosen = choose_simd();
  return chosen;
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Rows an odd number of cache lines apart, or of half lines for short ones: else the channels of
// one column compete for a few sets of the first-level cache.
int64_t spread(int64_t floats) {
  if (floats > 48) return round_up(floats, 16) | 16;
  const int64_t pitch = round_up(floats, 8);
  return pitch == 32 ? 40 : pitch;
}

// Sizes whose products below stay far from overflow.
constexpr int64_t kLargest = int64_t{1} << 31;
constexpr int64_t kLargestWindow = 1 << 15;

bool sane(const Problem& p) {
  for (int64_t n : {p.heads, p.channels, p.height, p.width, p.stride, p.dilation}) {
    if (n < 1 || n > kLargest) return false;
  }
  return p.batch >= 0 && p.batch <= kLargest && p.window >= 1 && p.window % 2 == 1 &&
         p.window <= kLargestWindow;
}

// The tables behind a geometry.
struct Tables {
  std::vector<int64_t> tap_offset;
  std::vector<ColumnPhase> phases;
  std::vector<Edge> edges;
};

// Reflection repeats after 2 (size - 1) rows, so a larger dilation equals its remainder.
int64_t reduced(int64_t dilation, int64_t size) {
  return size == 1 ? 0 : dilation % (2 * (size - 1));
}

int64_t reflect(int64_t i, int64_t size) {
  const int64_t period = size > 1 ? 2 * (size - 1) : 1;
  const int64_t phase = (i % period + period) % period;
  return phase < size ? phase : period - phase;
}

// The place in a key row of a column that counts from the first reflected one.
int64_t key_place(const Geometry& g, int64_t padded) {
  return padded % g.column_stride * g.phase_pitch + padded / g.column_stride;
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

Geometry make_geometry(const Problem& p, int64_t group, Tables& tables) {
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
  g.head_group = group;
  g.groups = ceil_div(g.heads, g.head_group);
  return g;
}

// Tasks enough for the threads to end together; each chunk of rows repeats the work of its halo,
// so no more of them than needed. Results do not depend on it.
void set_chunks(Geometry& g, int64_t rows, int64_t threads) {
  const int64_t whole = g.batch * g.groups;
  const int64_t wanted = threads > 1 ? ceil_div(4 * threads, whole > 0 ? whole : 1) : 1;
  const int64_t smallest = g.window + 2 * kBand;
  const int64_t chunk = ceil_div(rows, wanted);
  g.row_chunk = round_up(chunk > smallest ? chunk : smallest, kBand);
  g.chunks = ceil_div(rows, g.row_chunk);
}

// `t` has the sizes given, in a known type, and lies within its storage.
bool fits(const Tensor& t, int64_t batch, int64_t heads, int64_t channels, int64_t rows,
          int64_t columns) {
  const int64_t size[5] = {batch, heads, channels, rows, columns};
  int64_t last = 0;
  for (int i = 0; i < 5; i++) {
    if (t.size[i] != size[i] || t.stride[i] < 0) return false;
    if (t.stride[i] > (INT64_MAX - last) / (size[i] > 0 ? size[i] : 1)) return false;
    last += t.stride[i] * (size[i] > 0 ? size[i] - 1 : 0);
  }
  if (t.dtype < kFloat32 || t.dtype > kFloat16) return false;
  return batch == 0 || (t.data && last < t.extent);
}

// linspace(-1, 1, size), as the reference takes it: from both ends to the middle.
std::vector<float> location(int64_t size) {
  std::vector<float> at(static_cast<size_t>(size), -1.0f);
  const float step = size > 1 ? 2.0f / static_cast<float>(size - 1) : 0.0f;
  for (int64_t i = 0; i < size; i++) {
    const bool first_half = i < size / 2 || size == 1;
    at[static_cast<size_t>(i)] = first_half ? -1.0f + step * static_cast<float>(i)
                                            : 1.0f - step * static_cast<float>(size - 1 - i);
  }
  return at;
}

// The position of every place of a key row, 0 where there is no column.
std::vector<float> key_location(const Geometry& g) {
  const std::vector<float> columns = location(g.width);
  std::vector<float> at(static_cast<size_t>(g.key_pitch), 0.0f);
  for (int64_t padded = 0; padded < g.padded_width; padded++) {
    at[static_cast<size_t>(key_place(g, padded))] =
        columns[static_cast<size_t>(reflect(padded - g.column_pad, g.width))];
  }
  return at;
}

template <class Job>
struct Call {
  void (*task)(const Job&, int64_t, float*);
  const Job* job;

  static void run(const void* context, int64_t index, float* scratch) {
    const Call& call = *static_cast<const Call*>(context);
    call.task(*call.job, index, scratch);
  }
};

// A band of rows for each thread, as a bound in floating point, which does not overflow.
bool affordable(const Geometry& g) {
  const double rows = static_cast<double>(g.key_ring) * static_cast<double>(g.key_pitch) +
                      static_cast<double>(g.query_ring) * static_cast<double>(g.query_pitch);
  const double planes = static_cast<double>(g.channels) + static_cast<double>(g.taps);
  return rows * planes * static_cast<double>(g.head_group) < 1e11;
}

template <class Job>
int run(const Job& job, int64_t threads, int64_t (*scratch_size)(const Geometry&),
        void (*task)(const Job&, int64_t, float*)) {
  if (!affordable(job.g)) return kNoMemory;
  const int64_t scratch = scratch_size(job.g);
  const Call<Job> call{task, &job};
  const int64_t tasks = job.g.batch * job.g.groups * job.g.chunks;
  return run_tasks(threads, tasks, scratch, Call<Job>::run, &call) ? kOk : kNoMemory;
}

float sum_of(const std::vector<float>& values) {
  double total = 0.0;
  for (float value : values) total += value;
  return static_cast<float>(total);
}

void sum_position_gradient(const Geometry& g, const std::vector<float>& by_row, float* sums) {
  const size_t width = static_cast<size_t>(g.channels) * 2;
  std::vector<double> total(width, 0.0);
  for (size_t i = 0; i < by_row.size(); i++) total[i % width] += by_row[i];
  for (size_t i = 0; i < width; i++) sums[i] = static_cast<float>(total[i]);
}

int attention_forward(const Problem& p, const Tensor& q, const Tensor& k, const Tensor& v,
                      const float* position, float alpha, const Tensor& out, float* lse,
                      int64_t threads) {
  Attention job{};
  Tables tables;
  job.g = make_geometry(p, head_group(p, {&q, &k, &v, &out}), tables);
  set_chunks(job.g, job.g.out_height, threads);
  job.query = q;
  job.key = k;
  job.value = v;
  job.out = out;
  const std::vector<float> columns = key_location(job.g), rows = location(p.height);
  job.position = position;
  job.column_location = columns.data();
  job.row_location = rows.data();
  job.lse = lse;
  job.alpha = alpha;
  job.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.channels)));
  const Kernels& kernels = *simd().kernels;
  return run(job, threads, kernels.attention_forward_scratch, kernels.attention_forward);
}

int attention_backward(const Problem& p, Attention job, int64_t threads, float* grad_position,
                       float* grad_alpha) {
  Tables tables;
  job.g = make_geometry(p,
                        head_group(p, {&job.query, &job.key, &job.value, &job.grad_out,
                                       &job.grad_query, &job.grad_key, &job.grad_value}),
                        tables);
  set_chunks(job.g, job.g.height, threads);
  const std::vector<float> columns = key_location(job.g), rows = location(p.height);
  job.column_location = columns.data();
  job.row_location = rows.data();
  job.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.channels)));
  std::vector<float> by_row;
  if (grad_position) {
    by_row.resize(static_cast<size_t>(p.batch * p.heads * p.height * p.channels * 2));
    job.grad_position_by_row = by_row.data();
  }
  std::vector<float> alpha_by_row;
  if (grad_alpha) {
    alpha_by_row.resize(static_cast<size_t>(p.batch * p.heads * job.g.out_height));
    job.grad_alpha_by_row = alpha_by_row.data();
  }
  const Kernels& kernels = *simd().kernels;
  const int status =
      run(job, threads, kernels.attention_backward_scratch, kernels.attention_backward);
  if (grad_position) sum_position_gradient(job.g, by_row, grad_position);
  if (grad_alpha) *grad_alpha = sum_of(alpha_by_row);
  return status;
}

// The tables behind the geometry of a shift convolution.
struct ShiftTables {
  std::vector<ShiftPhase> phases;
  std::vector<ShiftTap> taps, sources, planes, gradient_taps;
  std::vector<int64_t> first_of_phase;
};

int64_t floor_div(int64_t n, int64_t by) { return n >= 0 ? n / by : -ceil_div(-n, by); }

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
    for (const ShiftTap& tap : tables.taps) {
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

bool sane(const ShiftProblem& p) {
  for (int64_t n : {p.groups, p.pieces, p.inputs, p.outputs}) {
    if (n < 1 || n > kLargest) return false;
  }
  const double kernels = static_cast<double>(p.groups) * static_cast<double>(p.outputs) *
                         static_cast<double>(p.inputs) * static_cast<double>(p.window);
  return kernels * static_cast<double>(p.window) < 1e12 &&
         sane(Problem{p.batch, p.groups, p.pieces, p.height, p.width, p.window, p.stride,
                      p.dilation});
}

bool affordable(const ShiftGeometry& g) {
  const double planes =
      static_cast<double>(g.phases + 1) * static_cast<double>(g.inputs + g.pieces) +
      static_cast<double>(g.outputs);
  return planes * static_cast<double>(g.plane_pitch) * static_cast<double>(g.group_block) < 1e11;
}

int run_shift(const Shift& job, int64_t threads, int64_t (*scratch_size)(const ShiftGeometry&),
              void (*task)(const Shift&, int64_t, float*)) {
  if (!affordable(job.g)) return kNoMemory;
  const Call<Shift> call{task, &job};
  const int64_t tasks = job.g.image_blocks * job.g.chunks * job.g.group_blocks;
  return run_tasks(threads, tasks, scratch_size(job.g), Call<Shift>::run, &call) ? kOk : kNoMemory;
}

int shift_forward(const ShiftProblem& p, const Tensor& pieces, const float* combine,
                  const float* weight, const Tensor& out, int64_t threads) {
  Shift job{};
  ShiftTables tables;
  job.g = make_shift_geometry(p, combine != nullptr, group_block(p, {&pieces, &out}), tables);
  job.pieces = pieces;
  job.combine = combine;
  job.out = out;
  job.weight = weight;
  job.accumulate = p.accumulate != 0;
  const Kernels& kernels = *simd().kernels;
  return run_shift(job, threads, kernels.shift_forward_scratch, kernels.shift_forward);
}

// Adds up `parts`, each as long as `sum`.
void sum_parts(const std::vector<float>& parts, float* sum, size_t size) {
  for (size_t i = 0; i < size; i++) sum[i] = 0.0f;
  for (size_t i = 0; i < parts.size(); i++) sum[i % size] += parts[i];
}

int shift_backward(const ShiftProblem& p, Shift job, float* grad_weight, float* grad_combine,
                   int64_t threads) {
  ShiftTables tables;
  job.g = make_shift_geometry(p, job.combine != nullptr,
                              group_block(p, {&job.pieces, &job.grad_out, &job.grad_pieces}),
                              tables);
  job.accumulate = p.accumulate != 0;
  const ShiftGeometry& g = job.g;
  const size_t size = static_cast<size_t>(g.groups * g.outputs * g.inputs * g.kernel);
  const size_t parts = static_cast<size_t>(g.image_blocks * g.chunks);
  std::vector<float> others(grad_weight && parts != 1 ? parts * size : 0);
  job.grad_weight = parts == 1 ? grad_weight : others.data();
  const size_t pairs = static_cast<size_t>(g.inputs * g.pieces);
  std::vector<float> combinations(
      g.combines && grad_weight ? parts * static_cast<size_t>(g.group_blocks) * pairs : 0);
  job.grad_combine = combinations.data();
  const Kernels& kernels = *simd().kernels;
  const int status = run_shift(job, threads, kernels.shift_backward_scratch,
                               kernels.shift_backward);
  if (grad_weight && parts != 1) sum_parts(others, grad_weight, size);
  if (grad_combine && grad_weight) sum_parts(combinations, grad_combine, pairs);
  return status;
}

bool sane(const PartitionProblem& p) {
  for (int64_t n : {p.heads, p.channels, p.height, p.width, p.rows, p.columns}) {
    if (n < 1 || n > kLargest) return false;
  }
  return p.batch >= 0 && p.batch <= kLargest && p.rows <= kLargestWindow &&
         p.columns <= kLargestWindow && p.height % p.rows == 0 && p.width % p.columns == 0 &&
         p.row_shift >= 0 && p.row_shift < p.rows && p.column_shift >= 0 &&
         p.column_shift < p.columns;
}

// As many parts as any machine has use for. No word of threads: gradients of the bias are summed
// part by part.
PartitionGeometry make_partition_geometry(const PartitionProblem& p) {
  constexpr int64_t most = 64;
  PartitionGeometry g{};
  g.p = p;
  g.tokens = p.rows * p.columns;
  g.down = p.height / p.rows;
  g.across = p.width / p.columns;
  g.pitch = round_up(g.tokens, 16);
  g.channel_pitch = round_up(p.channels, 16);
  const int64_t rows = p.batch * g.down;
  g.part_rows = rows > most ? ceil_div(rows, most) : 1;
  g.parts = ceil_div(rows, g.part_rows);
  return g;
}

bool affordable(const PartitionGeometry& g) {
  const double tokens = static_cast<double>(g.pitch);
  return tokens * (tokens + static_cast<double>(g.channel_pitch)) < 1e10;
}

int run_partition(const Partition& job, int64_t threads,
                  int64_t (*scratch_size)(const PartitionGeometry&),
                  void (*task)(const Partition&, int64_t, float*)) {
  const Call<Partition> call{task, &job};
  const int64_t tasks = job.g.parts * job.g.p.heads;
  return run_tasks(threads, tasks, scratch_size(job.g), Call<Partition>::run, &call) ? kOk
                                                                                     : kNoMemory;
}

int partition_forward(Partition job, int64_t threads) {
  if (!affordable(job.g)) return kNoMemory;
  const Kernels& kernels = *simd().kernels;
  return run_partition(job, threads, kernels.partition_forward_scratch, kernels.partition_forward);
}

int partition_backward(Partition job, float* grad_bias, int64_t threads) {
  if (!affordable(job.g)) return kNoMemory;
  const size_t size = static_cast<size_t>(job.g.p.heads * job.g.tokens * job.g.tokens);
  std::vector<float> parts(grad_bias ? static_cast<size_t>(job.g.parts) * size : 0);
  job.grad_bias = grad_bias ? parts.data() : nullptr;
  const Kernels& kernels = *simd().kernels;
  const int status = run_partition(job, threads, kernels.partition_backward_scratch,
                                   kernels.partition_backward);
  for (size_t i = 0; grad_bias && i < size; i++) {
    double sum = 0.0;
    for (size_t at = i; at < parts.size(); at += size) sum += parts[at];
    grad_bias[i] = static_cast<float>(sum);
  }
  return status;
}

Partition make_partition(const PartitionProblem& p) {
  Partition job{};
  job.g = make_partition_geometry(p);
  job.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.channels)));
  return job;
}

// A bad_alloc of the tables here, a status out there.
template <class Function>
int guarded(const Function& function) {
  try {
    return function();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

}  // namespace
}  // namespace acmix

using acmix::PartitionProblem;
using acmix::Problem;
using acmix::ShiftProblem;
using acmix::Tensor;

ACMIX_EXPORT int acmix_interface() { return 3; }

// GOMP_parallel of the OpenMP runtime that the caller uses, or null.
ACMIX_EXPORT void acmix_lend_threads(acmix::ParallelRegion region) { acmix::lend_threads(region); }

ACMIX_EXPORT const char* acmix_simd() { return acmix::simd().name; }

// `alpha` is a factor of the output, 1 where it is null.
ACMIX_EXPORT int acmix_attention_forward(const Problem* p, const Tensor* q, const Tensor* k,
                                         const Tensor* v, const float* position,
                                         const float* alpha, const Tensor* out, float* lse,
                                         int64_t threads) {
  if (!acmix::sane(*p)) return acmix::kBadProblem;
  const int64_t rows = acmix::ceil_div(p->height, p->stride);
  const int64_t columns = acmix::ceil_div(p->width, p->stride);
  for (const Tensor* t : {q, out}) {
    if (!acmix::fits(*t, p->batch, p->heads, p->channels, rows, columns)) return acmix::kBadTensor;
  }
  for (const Tensor* t : {k, v}) {
    if (!acmix::fits(*t, p->batch, p->heads, p->channels, p->height, p->width)) {
      return acmix::kBadTensor;
    }
  }
  return acmix::guarded([&] {
    return acmix::attention_forward(*p, *q, *k, *v, position, alpha ? *alpha : 1.0f, *out, lse,
                                    threads);
  });
}

ACMIX_EXPORT int acmix_attention_backward(const Problem* p, const Tensor* grad_out,
                                          const Tensor* q, const Tensor* k, const Tensor* v,
                                          const float* position, const float* alpha,
                                          const float* lse,
                                          const Tensor* grad_q, const Tensor* grad_k,
                                          const Tensor* grad_v, float* grad_position,
                                          float* grad_alpha, int64_t threads) {
  if (!acmix::sane(*p)) return acmix::kBadProblem;
  const int64_t rows = acmix::ceil_div(p->height, p->stride);
  const int64_t columns = acmix::ceil_div(p->width, p->stride);
  for (const Tensor* t : {q, grad_out, grad_q}) {
    if (!acmix::fits(*t, p->batch, p->heads, p->channels, rows, columns)) return acmix::kBadTensor;
  }
  for (const Tensor* t : {k, v, grad_k, grad_v}) {
    if (!acmix::fits(*t, p->batch, p->heads, p->channels, p->height, p->width)) {
      return acmix::kBadTensor;
    }
  }
  if (!lse && p->batch > 0) return acmix::kBadTensor;
  acmix::Attention job{};
  job.query = *q;
  job.key = *k;
  job.value = *v;
  job.grad_out = *grad_out;
  job.grad_query = *grad_q;
  job.grad_key = *grad_k;
  job.grad_value = *grad_v;
  job.position = position;
  job.alpha = alpha ? *alpha : 1.0f;
  job.lse = const_cast<float*>(lse);
  return acmix::guarded([&] {
    return acmix::attention_backward(*p, job, threads, grad_position, grad_alpha);
  });
}

// `heads` counts the channels of the weights, `channels` those of the values that share one.
ACMIX_EXPORT int acmix_aggregation_forward(const Problem* p, const Tensor* weight, const Tensor* v,
                                           const Tensor* out, int64_t threads) {
  if (!acmix::sane(*p)) return acmix::kBadProblem;
  const int64_t rows = acmix::ceil_div(p->height, p->stride);
  const int64_t columns = acmix::ceil_div(p->width, p->stride);
  if (!acmix::fits(*weight, p->batch, p->heads, p->window * p->window, rows, columns) ||
      !acmix::fits(*v, p->batch, p->heads, p->channels, p->height, p->width) ||
      !acmix::fits(*out, p->batch, p->heads, p->channels, rows, columns)) {
    return acmix::kBadTensor;
  }
  return acmix::guarded([&] {
    acmix::Tables tables;
    acmix::Aggregation job{};
    job.g = acmix::make_geometry(*p, acmix::head_group(*p, {weight, v, out}), tables);
    acmix::set_chunks(job.g, job.g.out_height, threads);
    job.weight = *weight;
    job.value = *v;
    job.out = *out;
    const acmix::Kernels& kernels = *acmix::simd().kernels;
    return acmix::run(job, threads, kernels.aggregation_forward_scratch,
                      kernels.aggregation_forward);
  });
}

ACMIX_EXPORT int acmix_aggregation_backward(const Problem* p, const Tensor* grad_out,
                                            const Tensor* weight, const Tensor* v,
                                            const Tensor* grad_weight, const Tensor* grad_v,
                                            int64_t threads) {
  if (!acmix::sane(*p)) return acmix::kBadProblem;
  const int64_t rows = acmix::ceil_div(p->height, p->stride);
  const int64_t columns = acmix::ceil_div(p->width, p->stride);
  for (const Tensor* t : {weight, grad_weight}) {
    if (!acmix::fits(*t, p->batch, p->heads, p->window * p->window, rows, columns)) {
      return acmix::kBadTensor;
    }
  }
  if (!acmix::fits(*grad_out, p->batch, p->heads, p->channels, rows, columns) ||
      !acmix::fits(*v, p->batch, p->heads, p->channels, p->height, p->width) ||
      !acmix::fits(*grad_v, p->batch, p->heads, p->channels, p->height, p->width)) {
    return acmix::kBadTensor;
  }
  return acmix::guarded([&] {
    acmix::Tables tables;
    acmix::Aggregation job{};
    job.g = acmix::make_geometry(
        *p, acmix::head_group(*p, {weight, v, grad_out, grad_weight, grad_v}), tables);
    acmix::set_chunks(job.g, job.g.height, threads);
    job.weight = *weight;
    job.value = *v;
    job.grad_out = *grad_out;
    job.grad_weight = *grad_weight;
    job.grad_value = *grad_v;
    const acmix::Kernels& kernels = *acmix::simd().kernels;
    return acmix::run(job, threads, kernels.aggregation_backward_scratch,
                      kernels.aggregation_backward);
  });
}

// `combine` is null where the pieces are the inputs.
ACMIX_EXPORT int acmix_shift_forward(const ShiftProblem* p, const Tensor* pieces,
                                     const float* combine, const float* weight, const Tensor* out,
                                     int64_t threads) {
  if (!acmix::sane(*p) || (!combine && p->pieces != p->inputs)) return acmix::kBadProblem;
  const int64_t rows = acmix::ceil_div(p->height, p->stride);
  const int64_t columns = acmix::ceil_div(p->width, p->stride);
  if (!acmix::fits(*pieces, p->batch, p->groups, p->pieces, p->height, p->width) ||
      !acmix::fits(*out, p->batch, p->groups, p->outputs, rows, columns) || !weight) {
    return acmix::kBadTensor;
  }
  return acmix::guarded([&] {
    return acmix::shift_forward(*p, *pieces, combine, weight, *out, threads);
  });
}

ACMIX_EXPORT int acmix_shift_backward(const ShiftProblem* p, const Tensor* grad_out,
                                      const Tensor* pieces, const float* combine,
                                      const float* weight, const Tensor* grad_pieces,
                                      float* grad_weight, float* grad_combine, int64_t threads) {
  if (!acmix::sane(*p) || (!combine && p->pieces != p->inputs)) return acmix::kBadProblem;
  const int64_t rows = acmix::ceil_div(p->height, p->stride);
  const int64_t columns = acmix::ceil_div(p->width, p->stride);
  for (const Tensor* t : {pieces, grad_pieces}) {
    if (!acmix::fits(*t, p->batch, p->groups, p->pieces, p->height, p->width)) {
      return acmix::kBadTensor;
    }
  }
  if (!acmix::fits(*grad_out, p->batch, p->groups, p->outputs, rows, columns) || !weight) {
    return acmix::kBadTensor;
  }
  acmix::Shift job{};
  job.pieces = *pieces;
  job.grad_out = *grad_out;
  job.grad_pieces = *grad_pieces;
  job.combine = combine;
  job.weight = weight;
  return acmix::guarded([&] {
    return acmix::shift_backward(*p, job, grad_weight, grad_combine, threads);
  });
}

ACMIX_EXPORT int acmix_partition_forward(const PartitionProblem* p, const Tensor* q,
                                         const Tensor* k, const Tensor* v, const float* bias,
                                         const Tensor* out, float* lse, int64_t threads) {
  if (!acmix::sane(*p)) return acmix::kBadProblem;
  for (const Tensor* t : {q, k, v, out}) {
    if (!acmix::fits(*t, p->batch, p->heads, p->channels, p->height, p->width)) {
      return acmix::kBadTensor;
    }
  }
  if (!bias || (!lse && p->batch > 0)) return acmix::kBadTensor;
  acmix::Partition job = acmix::make_partition(*p);
  job.query = *q;
  job.key = *k;
  job.value = *v;
  job.bias = bias;
  job.out = *out;
  job.lse = lse;
  return acmix::guarded([&] { return acmix::partition_forward(job, threads); });
}

ACMIX_EXPORT int acmix_partition_backward(const PartitionProblem* p, const Tensor* grad_out,
                                          const Tensor* q, const Tensor* k, const Tensor* v,
                                          const float* bias, const float* lse,
                                          const Tensor* grad_q, const Tensor* grad_k,
                                          const Tensor* grad_v, float* grad_bias,
                                          int64_t threads) {
  if (!acmix::sane(*p)) return acmix::kBadProblem;
  for (const Tensor* t : {grad_out, q, k, v, grad_q, grad_k, grad_v}) {
    if (!acmix::fits(*t, p->batch, p->heads, p->channels, p->height, p->width)) {
      return acmix::kBadTensor;
    }
  }
  if (!bias || (!lse && p->batch > 0)) return acmix::kBadTensor;
  acmix::Partition job = acmix::make_partition(*p);
  job.query = *q;
  job.key = *k;
  job.value = *v;
  job.bias = bias;
  job.grad_out = *grad_out;
  job.grad_query = *grad_q;
  job.grad_key = *grad_k;
  job.grad_value = *grad_v;
  job.lse = const_cast<float*>(lse);
  return acmix::guarded([&] { return acmix::partition_backward(job, grad_bias, threads); });
}
