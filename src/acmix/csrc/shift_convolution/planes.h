// The planes of a task: what it stages with zeros around it, and its results.
// Only for kernels, see vec.h.
#pragma once

#include "shift_convolution/job.h"
#include "simd/rows.h"
#include "simd/scratch.h"

namespace {

using acmix::Shift;
using acmix::ShiftGeometry;
using acmix::ShiftPhase;

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

  float* group(int64_t n) const { return data + n * group_pitch; }
  Rows rows(int64_t place) const { return {data + place, group_pitch, plane_pitch}; }
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

// Calls body(image, y, place) for each row of `t` that the task needs. Clears the rest of `count`
// planes: the gap before each row, the places after its pixels, and the rows above and below the map.
template <class Body>
void for_staged_rows(const ShiftGeometry& g, const Tensor& t, const ShiftTask& task,
                     const Planes& planes, int64_t count, const Body& body) {
  for (int64_t b = 0; b < task.images; b++) {
    const int64_t last = task.rows() + (b + 1 < task.images ? 0 : g.gap_y);
    for (int64_t row = -g.gap_y; row < last; row++) {
      const int64_t place = row_place(g, task, b, row), y = task.begin + row;
      const bool inside = y >= 0 && y < t.size[3];
      if (inside) body(task.image + b, y, place);
      for_planes(planes, task.groups, count, [&](float* plane) {
        for (int64_t x = -g.gap_x; x < 0; x++) plane[place + x] = 0.0f;
        for (int64_t x = inside ? t.size[4] : 0; x < g.out_width; x++) plane[place + x] = 0.0f;
      });
    }
  }
  const int64_t end = row_place(g, task, task.images - 1, task.rows() + g.gap_y) - g.gap_x;
  for_planes(planes, task.groups, count, [&](float* plane) {
    for (int64_t i = end; i < g.plane_pitch; i++) plane[i] = 0.0f;
  });
}

// The rows of the tensor with zeros around them.
void stage_planes(const ShiftGeometry& g, const Tensor& t, const ShiftTask& task,
                  const Planes& planes) {
  for_staged_rows(g, t, task, planes, t.size[2], [&](int64_t image, int64_t y, int64_t place) {
    load_rows(t, image, task.group, task.groups, y, planes.rows(place));
  });
}

// Those of one phase, which has `count` planes.
Planes phase_planes(const Planes& planes, int64_t phase, int64_t count) {
  return {planes.data + phase * count * planes.plane_pitch, planes.group_pitch,
          planes.plane_pitch};
}

// Calls body(image, y, place) for the rows of `t` that the task's results are. Planes of results
// have no gap before the first place.
template <class Body>
void for_results(const ShiftGeometry& g, const Tensor& t, const ShiftTask& task,
                 const Body& body) {
  for (int64_t b = 0; b < task.images; b++) {
    for (int64_t y = task.begin; y < smaller(task.end, t.size[3]); y++) {
      const int64_t place = row_place(g, task, b, y - task.begin) - row_place(g, task, 0, 0);
      body(task.image + b, y, place);
    }
  }
}

void load_results(const ShiftGeometry& g, const Tensor& t, const ShiftTask& task,
                  const Planes& planes) {
  for_results(g, t, task, [&](int64_t image, int64_t y, int64_t place) {
    load_rows(t, image, task.group, task.groups, y, planes.rows(place));
  });
}

void store_results(const ShiftGeometry& g, const Tensor& t, const ShiftTask& task,
                   const Planes& planes) {
  for_results(g, t, task, [&](int64_t image, int64_t y, int64_t place) {
    store_rows(t, image, task.group, task.groups, y, planes.rows(place));
  });
}

// Zeros between the rows of `t` in a plane of results, up to place `end`.
void clear_gaps(const ShiftGeometry& g, const Tensor& t, const ShiftTask& task, float* plane,
                int64_t end) {
  int64_t done = 0;
  for_results(g, t, task, [&](int64_t, int64_t, int64_t place) {
    clear(plane + done, place - done);
    done = place + t.size[4];
  });
  clear(plane + done, end - done);
}

}  // namespace
