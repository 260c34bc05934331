// The instruction set of this machine, and what the C interface has that is no operator's.

#include <cstdlib>
#include <cstring>

#include "api/run.h"

namespace acmix {
namespace {

// The widest instruction set of this machine that ACMIX_SIMD, where set, allows.
Simd choose_simd() {
#if defined(ACMIX_X86_VARIANTS)
  const char* wish = std::getenv("ACMIX_SIMD");
  const bool plain = wish && std::strcmp(wish, "plain") == 0;
  const bool narrow = plain || (wish && std::strcmp(wish, "avx2") == 0);
  __builtin_cpu_init();
  if (!narrow && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return {"avx512", 2};
  }
  if (!plain && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {"avx2", 1};
  }
#endif
#if defined(__aarch64__) && defined(__GNUC__)
  return {"neon", 0};
#else
  return {"plain", 0};
#endif
}

}  // namespace

const Simd& simd() {
  static const Simd chosen = choose_simd();
  return chosen;
}

}  // namespace acmix

ACMIX_EXPORT int acmix_interface() { return 3; }

// GOMP_parallel of the OpenMP runtime that the caller uses, or null.
ACMIX_EXPORT void acmix_lend_threads(acmix::ParallelRegion region) { acmix::lend_threads(region); }

ACMIX_EXPORT const char* acmix_simd() { return acmix::simd().name; }
