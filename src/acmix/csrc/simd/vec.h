// Float vectors of N lanes: the compiler's vector extension, or plain loops without it.
// Only for kernels, compiled once for each instruction set: everything has internal linkage, and no
// standard C++ header is included, since a shared inline function compiled with wider instructions
// could be the one that the linker keeps.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(ACMIX_NO_VECTOR_EXTENSION)
#define ACMIX_VECTOR_EXTENSION 1
#define ACMIX_INLINE inline __attribute__((always_inline))
#define ACMIX_INLINED __attribute__((always_inline))  // of a lambda
#if defined(__clang__)
#define ACMIX_UNROLL _Pragma("unroll")
#else
#define ACMIX_UNROLL _Pragma("GCC unroll 8")
#endif
#else
#include <cmath>
#define ACMIX_INLINE inline
#define ACMIX_INLINED
#define ACMIX_UNROLL
#endif

#if defined(__AVX512F__)
#define ACMIX_LANES 16
#define ACMIX_REGISTERS 32
#elif defined(__AVX2__)
#define ACMIX_LANES 8
#define ACMIX_REGISTERS 16
#elif defined(__aarch64__)
#define ACMIX_LANES 4
#define ACMIX_REGISTERS 32
#else
#define ACMIX_LANES 4
#define ACMIX_REGISTERS 16
#endif

namespace {

#if defined(ACMIX_VECTOR_EXTENSION)

template <int N>
struct Types {
  typedef float Float __attribute__((vector_size(N * 4)));
  typedef int32_t Int __attribute__((vector_size(N * 4)));
  typedef uint32_t Unsigned __attribute__((vector_size(N * 4)));
  typedef uint16_t Short __attribute__((vector_size(N * 2)));
};
template <int N>
using Float = typename Types<N>::Float;
template <int N>
using Int = typename Types<N>::Int;
template <int N>
using Unsigned = typename Types<N>::Unsigned;
template <int N>
using Short = typename Types<N>::Short;

template <int N>
ACMIX_INLINE Float<N> splat(float x) {
  return x - Float<N>{};
}

template <int N>
ACMIX_INLINE Float<N> max(Float<N> a, Float<N> b) {
  return a > b ? a : b;
}

// 2^x, relative error 2e-7, for x up to 126; x below -127.5 gives 0, as minus infinity does. The
// integer part makes a power of 2 by its bits, the rest in [-1/2, 1/2] goes through a polynomial,
// and the product of the two is NaN where x is.
template <int N>
ACMIX_INLINE Float<N> exp2(Float<N> x) {
  const Float<N> lowest = splat<N>(-128.0f);
  // Adding 1.5 * 2^23 rounds to an integer; 128 more, and the bits are those of the exponent of
  // 2^(n + 1). The polynomial is half of 2^f.
  const Float<N> shifter = splat<N>(12582912.0f + 128.0f);
  x = x < lowest ? lowest : x;
  const Float<N> shifted = x + shifter;
  const Float<N> f = x - (shifted - shifter);
  Float<N> p = splat<N>(1.5403530e-4f / 2);
  p = p * f + 1.3333558e-3f / 2;
  p = p * f + 9.6181291e-3f / 2;
  p = p * f + 5.5504109e-2f / 2;
  p = p * f + 2.4022651e-1f / 2;
  p = p * f + 6.9314718e-1f / 2;
  p = p * f + 1.0f / 2;
  return p * (Float<N>)((Int<N>)shifted << 23);
}

// log2 of a normal positive number, by the series of atanh around 1.
template <int N>
ACMIX_INLINE Float<N> log2(Float<N> x) {
  const Int<N> bits = (Int<N>)x;
  const Int<N> exponent = (bits - 0x3f3504f3) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  const Float<N> mantissa = (Float<N>)(bits - (exponent << 23));
  const Float<N> s = (mantissa - 1.0f) / (mantissa + 1.0f);
  const Float<N> s2 = s * s;
  Float<N> p = splat<N>(0.32059889f);
  p = p * s2 + 0.41219858f;
  p = p * s2 + 0.57707802f;
  p = p * s2 + 0.96179669f;
  p = p * s2 + 2.88539008f;
  const Float<N> value = p * s + __builtin_convertvector(exponent, Float<N>);
  return x == x ? value : x;
}

#else

template <int N>
struct Float {
  float lane[N];
  float operator[](int i) const { return lane[i]; }
};

#define ACMIX_OPERATOR(op)                                         \
  template <int N>                                                 \
  inline Float<N> operator op(Float<N> a, const Float<N>& b) {     \
    for (int i = 0; i < N; i++) a.lane[i] = a.lane[i] op b.lane[i]; \
    return a;                                                      \
  }                                                                \
  template <int N>                                                 \
  inline Float<N>& operator op##=(Float<N>& a, const Float<N>& b) { \
    return a = a op b;                                             \
  }
ACMIX_OPERATOR(+)
ACMIX_OPERATOR(-)
ACMIX_OPERATOR(*)
ACMIX_OPERATOR(/)
#undef ACMIX_OPERATOR

template <int N>
inline Float<N> splat(float x) {
  Float<N> v;
  for (int i = 0; i < N; i++) v.lane[i] = x;
  return v;
}

template <int N>
inline Float<N> max(Float<N> a, const Float<N>& b) {
  for (int i = 0; i < N; i++) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}

template <int N>
inline Float<N> exp2(Float<N> x) {
  for (int i = 0; i < N; i++) x.lane[i] = std::exp2(x.lane[i]);
  return x;
}

template <int N>
inline Float<N> log2(Float<N> x) {
  for (int i = 0; i < N; i++) x.lane[i] = std::log2(x.lane[i]);
  return x;
}

#endif

template <int N>
ACMIX_INLINE Float<N> load(const float* p) {
  Float<N> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <int N>
ACMIX_INLINE void store(float* p, Float<N> v) {
  std::memcpy(p, &v, sizeof v);
}

// Keeps a vector that is used several times in its register: the compiler would rather load it
// again as an operand of each use.
template <class V>
ACMIX_INLINE void keep(V& v) {
#if defined(ACMIX_VECTOR_EXTENSION) && defined(__AVX512F__)
  __asm__("" : "+v"(v));
#elif defined(ACMIX_VECTOR_EXTENSION) && defined(__x86_64__)
  __asm__("" : "+x"(v));
#elif defined(ACMIX_VECTOR_EXTENSION) && defined(__aarch64__)
  __asm__("" : "+w"(v));
#else
  (void)v;
#endif
}

}  // namespace
