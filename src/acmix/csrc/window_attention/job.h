// Attention of every pixel to the window around it.
#pragma once

#include "sliding/job.h"

namespace acmix {

struct Attention {
  Geometry g;
  Tensor query, key, value, out;
  Tensor grad_out, grad_query, grad_key, grad_value;
  const float* position;  // [channels][2] or null
  const float* column_location;  // [key_pitch]
  const float* row_location;     // [height]
  float* lse;                    // [batch][heads][out_height][out_width], base 2
  float* grad_position_by_row;   // [batch][heads][height][channels][2] or null
  float* grad_alpha_by_row;      // [batch][heads][out_height] or null
  float scale;                   // of the logits
  float alpha;                   // factor of the outputs
};

ACMIX_DECLARE_KERNELS(Attention, attention);

}  // namespace acmix
