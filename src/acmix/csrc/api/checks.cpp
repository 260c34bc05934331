#include "api/checks.h"

namespace acmix {
namespace {

bool fits(const Tensor& t, const Size& s) {
  const int64_t size[5] = {s.batch, s.heads, s.channels, s.rows, s.columns};
  int64_t last = 0;
  for (int i = 0; i < 5; i++) {
    if (t.size[i] != size[i] || t.stride[i] < 0) return false;
    if (t.stride[i] > (INT64_MAX - last) / (size[i] > 0 ? size[i] : 1)) return false;
    last += t.stride[i] * (size[i] > 0 ? size[i] - 1 : 0);
  }
  if (t.dtype < kFloat32 || t.dtype > kFloat16) return false;
  return s.batch == 0 || (t.data && last < t.extent);
}

}  // namespace

bool sane_sizes(std::initializer_list<int64_t> sizes) {
  for (int64_t n : sizes) {
    if (n < 1 || n > kLargest) return false;
  }
  return true;
}

bool fit(std::initializer_list<const Tensor*> tensors, const Size& size) {
  for (const Tensor* t : tensors) {
    if (!fits(*t, size)) return false;
  }
  return true;
}

}  // namespace acmix
