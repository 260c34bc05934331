// Softmax over taps, N queries side by side, in powers of 2. Only for kernels, see vec.h.
#pragma once

#include "simd/vec.h"

namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Sums over taps run in several parts: shorter chains for the machine, smaller rounding errors.
constexpr int kParts = 4;

template <int N>
struct Sum {
  Float<N> part[kParts];

  Sum() {
    for (Float<N>& p : part) p = splat<N>(0.0f);
  }
  Float<N> total() const { return (part[0] + part[1]) + (part[2] + part[3]); }
};

// Calls body(tap, part) for every tap, the parts in turn.
template <class Body>
ACMIX_INLINE void for_taps(int64_t taps, const Body& body) {
  int64_t t = 0;
  for (; t + kParts <= taps; t += kParts) {
    ACMIX_UNROLL
    for (int i = 0; i < kParts; i++) body(t + i, i);
  }
  for (; t < taps; t++) body(t, 0);
}

// 2^x, in subnormal numbers too, which are slow.
template <int N>
Float<N> subnormal_exp2(Float<N> x) {
  const Float<N> root = exp2<N>(x * splat<N>(0.5f));
  return root * root;
}

// The largest logit, and in place of the logits 2^(logit - largest), with their sum.
template <int N, Float<N> Power(Float<N>) = exp2<N>>
void exponentiate(float* logits, int64_t taps, int64_t pitch, Float<N>& largest, Float<N>& sum) {
  Float<N> m[kParts];
  for (Float<N>& part : m) part = load<N>(logits);
  for_taps(taps, [&](int64_t t, int i) ACMIX_INLINED {
    m[i] = max<N>(m[i], load<N>(logits + t * pitch));
  });
  largest = max<N>(max<N>(m[0], m[1]), max<N>(m[2], m[3]));
  Sum<N> s;
  for_taps(taps, [&](int64_t t, int i) ACMIX_INLINED {
    const Float<N> p = Power(load<N>(logits + t * pitch) - largest);
    s.part[i] += p;
    store<N>(logits + t * pitch, p);
  });
  sum = s.total();
}

// In place: logits become probabilities P, their gradients dP become P (dP - sum of P dP); that sum
// is returned. The sum of P is taken again: a rounded log-sum-exp alone would leave it an ulp of a
// large number from 1.
template <int N>
Float<N> softmax_backward(float* logits, float* gradients, int64_t taps, int64_t pitch,
                          Float<N> lse) {
  Sum<N> sum, product;
  for_taps(taps, [&](int64_t t, int i) ACMIX_INLINED {
    const Float<N> p = exp2<N>(load<N>(logits + t * pitch) - lse);
    sum.part[i] += p;
    product.part[i] += p * load<N>(gradients + t * pitch);
    store<N>(logits + t * pitch, p);
  });
  const Float<N> inverse = splat<N>(1.0f) / sum.total();
  const Float<N> delta = product.total() * inverse;
  for (int64_t t = 0; t < taps; t++) {
    const Float<N> p = load<N>(logits + t * pitch) * inverse;
    store<N>(logits + t * pitch, p);
    store<N>(gradients + t * pitch, p * (load<N>(gradients + t * pitch) - delta));
  }
  return delta;
}

// In place: logits become probabilities, each 0 where a softmax in float32 rounds it to 0 and not
// else. What they weight may be infinite.
template <int N>
void exact_softmax(float* logits, int64_t taps, int64_t pitch) {
  Float<N> largest, sum;
  exponentiate<N, subnormal_exp2<N>>(logits, taps, pitch, largest, sum);
  for (int64_t t = 0; t < taps * pitch; t += pitch) {
    store<N>(logits + t, load<N>(logits + t) / sum);
  }
}

// The same as softmax_backward, with such probabilities.
template <int N>
void exact_softmax_backward(float* logits, float* gradients, int64_t taps, int64_t pitch) {
  exact_softmax<N>(logits, taps, pitch);
  Float<N> delta = splat<N>(0.0f);
  for (int64_t t = 0; t < taps * pitch; t += pitch) {
    delta += load<N>(logits + t) * load<N>(gradients + t);
  }
  for (int64_t t = 0; t < taps * pitch; t += pitch) {
    store<N>(gradients + t, load<N>(logits + t) * (load<N>(gradients + t) - delta));
  }
}

}  // namespace
