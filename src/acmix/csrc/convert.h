// Element types as they are stored, and their conversion to and from float32.
// Only for kernel.cpp, see vec.h.
#pragma once

#include "vec.h"

namespace {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

ACMIX_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

ACMIX_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

ACMIX_INLINE float to_float(float x) { return x; }

ACMIX_INLINE float to_float(Bfloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

// The 15 low bits, read as a float, are 2^-112 times the number, subnormals included.
ACMIX_INLINE float to_float(Float16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t finite = to_bits(from_bits(magnitude) * 5.192296858534828e33f);
  const uint32_t value = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : finite;
  return from_bits(value | ((x.bits & 0x8000u) << 16));
}

ACMIX_INLINE void assign(float& to, float x) { to = x; }

ACMIX_INLINE void assign(Bfloat16& to, float x) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}

// Round to nearest even; below the smallest normal number an addition does the rounding.
ACMIX_INLINE void assign(Float16& to, float x) {
  const uint32_t sign = to_bits(x) & 0x80000000u;
  const uint32_t magnitude = to_bits(x) ^ sign;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t value = magnitude >= 0x47800000u ? special : finite;
  to.bits = static_cast<uint16_t>(value | (sign >> 16));
}

template <int N, class T>
ACMIX_INLINE Float<N> load_as_float(const T* p) {
  float lanes[N];
  for (int i = 0; i < N; i++) lanes[i] = to_float(p[i]);
  return load<N>(lanes);
}

template <int N, class T>
ACMIX_INLINE void store_from_float(T* p, Float<N> v) {
  float lanes[N];
  store<N>(lanes, v);
  for (int i = 0; i < N; i++) assign(p[i], lanes[i]);
}

// Four vectors of four lanes, rows for columns.
ACMIX_INLINE void transpose(Float<4> v[4]) {
  float t[4][4];
#if defined(ACMIX_VECTOR_EXTENSION) && (defined(__clang__) || __GNUC__ >= 12)
  const Float<4> a = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5);
  const Float<4> b = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5);
  const Float<4> c = __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7);
  const Float<4> d = __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
  v[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  v[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  v[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  v[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
  (void)t;
#else
  for (int i = 0; i < 4; i++) {
    for (int j = 0; j < 4; j++) t[j][i] = v[i][j];
  }
  for (int i = 0; i < 4; i++) v[i] = load<4>(t[i]);
#endif
}

}  // namespace
