// Rows of a tensor to and from float32 [channel][column], whatever its layout and type.
// Only for kernel.cpp, see vec.h.
#pragma once

#include "convert.h"
#include "job.h"

namespace {

using acmix::Tensor;

// Rows are short: wider vectors would leave more of them to the loop over the rest.
constexpr int kRun = ACMIX_LANES > 8 ? 8 : ACMIX_LANES;

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
const T* row_start(const Tensor& t, int64_t batch, int64_t head, int64_t y) {
  return static_cast<const T*>(t.data) + batch * t.stride[0] + head * t.stride[1] +
         y * t.stride[3];
}

// A band of rows is staged at a time. While it is worked on the next one comes from memory, asked
// for when the row above it is read: rows are too short for the machine to foresee it.
ACMIX_INLINE void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#else
  (void)p;
#endif
}

template <class T>
void load_run(const T* from, float* to, int64_t count, int64_t ahead) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += line) prefetch(from + ahead + i);
  int64_t i = 0;
  for (; i + kRun <= count; i += kRun) store<kRun>(to + i, load_as_float<kRun>(from + i));
  if (count < 4) {
    for (; i < count; i++) to[i] = to_float(from[i]);
  }
  for (; i < count; i += 4) {
    i = i + 4 > count ? count - 4 : i;  // the last ones overlap those before
    store<4>(to + i, load_as_float<4>(from + i));
  }
}

template <class T>
void store_run(const float* from, T* to, int64_t count) {
  int64_t i = 0;
  for (; i + kRun <= count; i += kRun) store_from_float<kRun>(to + i, load<kRun>(from + i));
  if (count < 4) {
    for (; i < count; i++) assign(to[i], from[i]);
  }
  for (; i < count; i += 4) {
    i = i + 4 > count ? count - 4 : i;
    store_from_float<4>(to + i, load<4>(from + i));
  }
}

// `planes` values side by side at each of `count` pixels, into one row a plane, in 4 x 4 blocks; the
// last pixels' block overlaps the one before.
template <class T>
void load_interleaved(const T* from, int64_t pixel_stride, int64_t planes, float* to,
                      int64_t pitch, int64_t count, int64_t ahead) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t whole = count < 4 ? 0 : planes / 4 * 4;
  for (int64_t p = 0; p < whole; p += 4) {
    for (int64_t next = 0; next < count; next += 4) {
      const int64_t x = next + 4 > count ? count - 4 : next;
      Float<4> v[4];
      for (int i = 0; p % line == 0 && i < 4; i++) {
        prefetch(from + ahead + (x + i) * pixel_stride + p);
      }
      for (int i = 0; i < 4; i++) v[i] = load_as_float<4>(from + (x + i) * pixel_stride + p);
      transpose(v);
      for (int i = 0; i < 4; i++) store<4>(to + (p + i) * pitch + x, v[i]);
    }
  }
  for (int64_t x = 0; x < count; x++) {
    for (int64_t p = whole; p < planes; p++) to[p * pitch + x] = to_float(from[x * pixel_stride + p]);
  }
}

template <class T>
void store_interleaved(const float* from, int64_t pitch, T* to, int64_t pixel_stride,
                       int64_t planes, int64_t count) {
  const int64_t whole = count < 4 ? 0 : planes / 4 * 4;
  for (int64_t p = 0; p < whole; p += 4) {
    for (int64_t next = 0; next < count; next += 4) {
      const int64_t x = next + 4 > count ? count - 4 : next;
      Float<4> v[4];
      for (int i = 0; i < 4; i++) v[i] = load<4>(from + (p + i) * pitch + x);
      transpose(v);
      for (int i = 0; i < 4; i++) store_from_float<4>(to + (x + i) * pixel_stride + p, v[i]);
    }
  }
  for (int64_t x = 0; x < count; x++) {
    for (int64_t p = whole; p < planes; p++) assign(to[x * pixel_stride + p], from[p * pitch + x]);
  }
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
  switch (t.dtype) {
    case acmix::kBfloat16:
      return load_typed<Bfloat16>(t, batch, head, heads, y, to);
    case acmix::kFloat16:
      return load_typed<Float16>(t, batch, head, heads, y, to);
    default:
      return load_typed<float>(t, batch, head, heads, y, to);
  }
}

void store_rows(const Tensor& t, int64_t batch, int64_t head, int64_t heads, int64_t y,
                Rows rows) {
  switch (t.dtype) {
    case acmix::kBfloat16:
      return store_typed<Bfloat16>(t, batch, head, heads, y, rows);
    case acmix::kFloat16:
      return store_typed<Float16>(t, batch, head, heads, y, rows);
    default:
      return store_typed<float>(t, batch, head, heads, y, rows);
  }
}

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
  switch (t.dtype) {
    case acmix::kBfloat16:
      return load_pixels_typed<Bfloat16>(t, batch, head, y, x, count, to, pitch);
    case acmix::kFloat16:
      return load_pixels_typed<Float16>(t, batch, head, y, x, count, to, pitch);
    default:
      return load_pixels_typed<float>(t, batch, head, y, x, count, to, pitch);
  }
}

void store_pixels(const Tensor& t, int64_t batch, int64_t head, int64_t y, int64_t x,
                  int64_t count, const float* from, int64_t pitch) {
  switch (t.dtype) {
    case acmix::kBfloat16:
      return store_pixels_typed<Bfloat16>(t, batch, head, y, x, count, from, pitch);
    case acmix::kFloat16:
      return store_pixels_typed<Float16>(t, batch, head, y, x, count, from, pitch);
    default:
      return store_pixels_typed<float>(t, batch, head, y, x, count, from, pitch);
  }
}

}  // namespace
