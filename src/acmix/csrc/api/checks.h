// Checks of what the caller gives: sizes, tensors, memory.
#pragma once

#include <initializer_list>

#include "common/job.h"

namespace acmix {

enum Status : int { kOk = 0, kBadProblem = 1, kBadTensor = 2, kNoMemory = 3 };

// Sizes whose products stay far from overflow.
constexpr int64_t kLargest = int64_t{1} << 31;
constexpr int64_t kLargestWindow = 1 << 15;

// All of them from 1 to kLargest.
bool sane_sizes(std::initializer_list<int64_t> sizes);

struct Size {
  int64_t batch, heads, channels, rows, columns;
};

// Each tensor has the size given, in a known type, and lies within its storage.
bool fit(std::initializer_list<const Tensor*> tensors, const Size& size);

}  // namespace acmix
