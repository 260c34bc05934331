// Rows of a tensor to and from float32 [channel][column], whatever its layout and type.
// Only for kernels, see vec.h.
#pragma once

#include "simd/runs.h"

namespace {

// Rows of `heads` heads in scratch.
struct Rows {
  float* data;
  int64_t head_pitch, channel_pitch;
};

// Every `step`-th row (dimension 3) or column (4) of a tensor, from the `first` on.
Tensor every(Tensor t, int dimension, int64_t first, int64_t step) {
  const int64_t size = t.dtype == acmix::kFloat32 ? 4 : 2;
  t.data = static_cast<char*>(t.data) + first * t.stride[dimension] * size;
  t.size[dimension] = (t.size[dimension] - first + step - 1) / step;
  t.stride[dimension] *= step;
  return t;
}

template <class T>
void load_typed(const Tensor& t, int64_t batch, int64_t head, int64_t heads, int64_t y, Rows to) {
  const T* from = row_start<T>(t, batch, head, y);
  const int64_t channels = t.size[2], width = t.size[4], ahead = acmix::kBand * t.stride[3];
  if (t.stride[4] != 1 && t.stride[2] == 1) {
    for (int64_t n = 0; n < heads; n++) {
      load_interleaved(from + n * t.stride[1], t.stride[4], channels, to.data + n * to.head_pitch,
                       to.channel_pitch, width, ahead);
    }
  } else if (t.stride[4] != 1 && t.stride[1] == 1) {
    for (int64_t c = 0; c < channels; c++) {
      load_interleaved(from + c * t.stride[2], t.stride[4], heads, to.data + c * to.channel_pitch,
                       to.head_pitch, width, ahead);
    }
  } else {
    for (int64_t n = 0; n < heads; n++) {
      for (int64_t c = 0; c < channels; c++) {
        const T* run = from + n * t.stride[1] + c * t.stride[2];
        float* row = to.data + n * to.head_pitch + c * to.channel_pitch;
        if (t.stride[4] == 1) {
          load_run(run, row, width, ahead);
        } else if (t.stride[4] == 2) {  // a step that the compiler knows can be done by vectors
          for (int64_t x = 0; x < width; x++) row[x] = to_float(run[2 * x]);
        } else {
          for (int64_t x = 0; x < width; x++) row[x] = to_float(run[x * t.stride[4]]);
        }
      }
    }
  }
}

template <class T>
void store_typed(const Tensor& t, int64_t batch, int64_t head, int64_t heads, int64_t y,
                 Rows rows) {
  T* to = const_cast<T*>(row_start<T>(t, batch, head, y));
  const int64_t channels = t.size[2], width = t.size[4];
  if (t.stride[4] != 1 && t.stride[2] == 1) {
    for (int64_t n = 0; n < heads; n++) {
      store_interleaved(rows.data + n * rows.head_pitch, rows.channel_pitch, to + n * t.stride[1],
                        t.stride[4], channels, width);
    }
  } else if (t.stride[4] != 1 && t.stride[1] == 1) {
    for (int64_t c = 0; c < channels; c++) {
      store_interleaved(rows.data + c * rows.channel_pitch, rows.head_pitch, to + c * t.stride[2],
                        t.stride[4], heads, width);
    }
  } else {
    for (int64_t n = 0; n < heads; n++) {
      for (int64_t c = 0; c < channels; c++) {
        T* run = to + n * t.stride[1] + c * t.stride[2];
        const float* row = rows.data + n * rows.head_pitch + c * rows.channel_pitch;
        if (t.stride[4] == 1) {
          store_run(row, run, width);
        } else {
          for (int64_t x = 0; x < width; x++) assign(run[x * t.stride[4]], row[x]);
        }
      }
    }
  }
}

void load_rows(const Tensor& t, int64_t batch, int64_t head, int64_t heads, int64_t y, Rows to) {
  with_type(t, [&](auto type) { load_typed<decltype(type)>(t, batch, head, heads, y, to); });
}

void store_rows(const Tensor& t, int64_t batch, int64_t head, int64_t heads, int64_t y,
                Rows rows) {
  with_type(t, [&](auto type) { store_typed<decltype(type)>(t, batch, head, heads, y, rows); });
}

}  // namespace
