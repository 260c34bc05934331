// Elements of a tensor to and from float32: runs of them, and values side by side at each pixel.
// Only for kernels, see vec.h.
#pragma once

#include "common/job.h"
#include "simd/convert.h"

namespace {

using acmix::Tensor;

// Rows are short: wider vectors would leave more of them to the loop over the rest.
constexpr int kRun = ACMIX_LANES > 8 ? 8 : ACMIX_LANES;

// Calls body(T{}), T being the type of an element.
template <class Body>
ACMIX_INLINE void with_type(const Tensor& t, const Body& body) {
  switch (t.dtype) {
    case acmix::kBfloat16:
      return body(Bfloat16{});
    case acmix::kFloat16:
      return body(Float16{});
    default:
      return body(0.0f);
  }
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

}  // namespace
