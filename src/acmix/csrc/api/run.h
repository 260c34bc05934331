// How an entry point runs its job: by the kernels of this machine's instruction set.
#pragma once

#include <new>

#include "api/checks.h"
#include "api/pool.h"
#include "common/job.h"

#if defined(_WIN32)
#define ACMIX_EXPORT extern "C" __declspec(dllexport)
#else
#define ACMIX_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// An operator's kernels for each instruction set, the narrowest first.
#if defined(ACMIX_X86_VARIANTS)
#define ACMIX_VARIANTS(name) {&name##_plain, &name##_avx2, &name##_avx512}
#else
#define ACMIX_VARIANTS(name) {&name##_plain}
#endif

namespace acmix {

struct Simd {
  const char* name;
  int variant;
};

const Simd& simd();

template <class Job, size_t Count>
const Kernels<Job>& kernels_of(const Kernels<Job>* const (&variants)[Count]) {
  return *variants[simd().variant];
}

template <class Job>
struct Call {
  const Kernel<Job>& kernel;
  const Job& job;

  static void run(const void* context, int64_t index, float* scratch) {
    const Call& call = *static_cast<const Call*>(context);
    call.kernel.task(call.job, index, scratch);
  }
};

template <class Job>
int run(const Job& job, const Kernel<Job>& kernel, int64_t tasks, int64_t threads) {
  const Call<Job> call{kernel, job};
  const int64_t scratch = kernel.scratch(job.g);
  return run_tasks(threads, tasks, scratch, Call<Job>::run, &call) ? kOk : kNoMemory;
}

// A bad_alloc of the tables here, a status out there.
template <class Function>
int guarded(const Function& function) {
  try {
    return function();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

}  // namespace acmix
