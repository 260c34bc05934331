// What the jobs of all operators share: their tensors, and the kernels that each instruction set
// has for them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace acmix {

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// A (batch, heads, channels, rows, columns) tensor in any layout; strides count elements.
struct Tensor {
  void* data;
  int64_t extent;  // elements from `data` to the end of its storage
  int64_t size[5];
  int64_t stride[5];
  int32_t dtype;
};

// Of a linear map of planes: where its source lies and which weight it has.
struct Tap {
  int64_t offset;  // from an output's place in its plane to that of its source
  int64_t index;   // of the weight
};

// At most this many rows share one load of a neighbour's row.
constexpr int kBand = 3;

// One pass over a job, task by task, each in scratch of its own, counted in floats.
template <class Job>
struct Kernel {
  int64_t (*scratch)(const decltype(Job::g)&);
  void (*task)(const Job&, int64_t index, float* scratch);
};

template <class Job>
struct Kernels {
  Kernel<Job> forward, backward;
};

}  // namespace acmix

// An operator's kernels are named after it and the instruction set that they are compiled for.
#define ACMIX_DECLARE_KERNELS(Job, name) \
  extern const Kernels<Job> name##_plain, name##_avx2, name##_avx512
