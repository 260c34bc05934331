// Element types as they are stored, and their conversion to and from float32.
// Only for kernels, see vec.h.
#pragma once

#include "simd/vec.h"

namespace {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The conversions below are written once for a number and, where the compiler has vectors, for a
// vector of them: F holds floats, U unsigned 32-bit integers, as many.

template <class To, class From>
ACMIX_INLINE To reinterpret(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

template <class F, class U>
ACMIX_INLINE F widen(U bits, Bfloat16) {
  return reinterpret<F>(bits << 16);
}

// The 15 low bits, read as a float, are 2^-112 times the number, subnormals included.
template <class F, class U>
ACMIX_INLINE F widen(U bits, Float16) {
  const U magnitude = (bits & 0x7fffu) << 13;
  const U finite = reinterpret<U>(reinterpret<F>(magnitude) * 5.192296858534828e33f);
  const U value = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : finite;
  return reinterpret<F>(value | ((bits & 0x8000u) << 16));
}

template <class U, class F>
ACMIX_INLINE U narrow(F x, Bfloat16) {
  const U bits = reinterpret<U>(x);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? ((bits >> 16) | 0x40u) : rounded;
}

// Round to nearest even; below the smallest normal number an addition does the rounding.
template <class U, class F>
ACMIX_INLINE U narrow(F x, Float16) {
  const U sign = reinterpret<U>(x) & 0x80000000u;
  const U magnitude = reinterpret<U>(x) ^ sign;
  const U normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const U subnormal = reinterpret<U>(reinterpret<F>(magnitude) + 0.5f) - 0x3f000000u;
  const U infinite = (magnitude & 0u) | 0x7c00u;
  const U special = magnitude > 0x7f800000u ? (infinite | 0x200u) : infinite;
  const U finite = magnitude < 0x38800000u ? subnormal : normal;
  const U value = magnitude >= 0x47800000u ? special : finite;
  return value | (sign >> 16);
}

ACMIX_INLINE float to_float(float x) { return x; }

template <class T>
ACMIX_INLINE float to_float(T x) {
  return widen<float>(static_cast<uint32_t>(x.bits), x);
}

ACMIX_INLINE void assign(float& to, float x) { to = x; }

template <class T>
ACMIX_INLINE void assign(T& to, float x) {
  to.bits = static_cast<uint16_t>(narrow<uint32_t>(x, to));
}

template <int N, class T>
ACMIX_INLINE Float<N> load_as_float(const T* p) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return load<N>(p);
  } else {
#if defined(ACMIX_VECTOR_EXTENSION)
    Short<N> bits;
    std::memcpy(&bits, p, sizeof bits);
    return widen<Float<N>>(__builtin_convertvector(bits, Unsigned<N>), T{});
#else
    Float<N> v;
    for (int i = 0; i < N; i++) v.lane[i] = to_float(p[i]);
    return v;
#endif
  }
}

template <int N, class T>
ACMIX_INLINE void store_from_float(T* p, Float<N> v) {
  if constexpr (sizeof(T) == sizeof(float)) {
    store<N>(p, v);
  } else {
#if defined(ACMIX_VECTOR_EXTENSION)
    const Short<N> bits = __builtin_convertvector(narrow<Unsigned<N>>(v, T{}), Short<N>);
    std::memcpy(p, &bits, sizeof bits);
#else
    for (int i = 0; i < N; i++) assign(p[i], v.lane[i]);
#endif
  }
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
