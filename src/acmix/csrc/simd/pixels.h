// Pixels of a tensor, each with its channels side by side, to and from float32, whatever the
// tensor's layout and type. Only for kernels, see vec.h.
#pragma once

#include "simd/runs.h"

namespace {

template <class T>
void load_pixels_typed(const Tensor& t, int64_t batch, int64_t head, int64_t y, int64_t x,
                       int64_t count, float* to, int64_t pitch) {
  const T* from = row_start<T>(t, batch, head, y) + x * t.stride[4];
  for (int64_t i = 0; i < count; i++, from += t.stride[4], to += pitch) {
    if (t.stride[2] == 1) {
      load_run(from, to, t.size[2], t.stride[3]);
    } else {
      for (int64_t c = 0; c < t.size[2]; c++) to[c] = to_float(from[c * t.stride[2]]);
    }
  }
}

template <class T>
void store_pixels_typed(const Tensor& t, int64_t batch, int64_t head, int64_t y, int64_t x,
                        int64_t count, const float* from, int64_t pitch) {
  T* to = const_cast<T*>(row_start<T>(t, batch, head, y)) + x * t.stride[4];
  for (int64_t i = 0; i < count; i++, to += t.stride[4], from += pitch) {
    if (t.stride[2] == 1) {
      store_run(from, to, t.size[2]);
    } else {
      for (int64_t c = 0; c < t.size[2]; c++) assign(to[c * t.stride[2]], from[c]);
    }
  }
}

// The channels of `count` pixels of a row from column x on, one pixel each `pitch`.
void load_pixels(const Tensor& t, int64_t batch, int64_t head, int64_t y, int64_t x, int64_t count,
                 float* to, int64_t pitch) {
  with_type(t, [&](auto type) {
    load_pixels_typed<decltype(type)>(t, batch, head, y, x, count, to, pitch);
  });
}

void store_pixels(const Tensor& t, int64_t batch, int64_t head, int64_t y, int64_t x,
                  int64_t count, const float* from, int64_t pitch) {
  with_type(t, [&](auto type) {
    store_pixels_typed<decltype(type)>(t, batch, head, y, x, count, from, pitch);
  });
}

}  // namespace
