// Sums over the window around every pixel, with the weights given.
#pragma once

#include "sliding/job.h"

namespace acmix {

struct Aggregation {
  Geometry g;
  Tensor weight, value, out;
  Tensor grad_out, grad_weight, grad_value;
};

ACMIX_DECLARE_KERNELS(Aggregation, aggregation);

}  // namespace acmix
