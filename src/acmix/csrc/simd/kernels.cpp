// The kernels of all operators, compiled once for each instruction set: ACMIX_ISA is its name.

#include "partition_attention/kernel.h"
#include "shift_convolution/kernel.h"
#include "weighted_aggregation/kernel.h"
#include "window_attention/kernel.h"
