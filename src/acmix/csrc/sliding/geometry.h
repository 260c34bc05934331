// Checks of a job with sliding windows, and its geometry. Not for kernels.
#pragma once

#include <vector>

#include "api/checks.h"
#include "sliding/job.h"

namespace acmix {

bool sane(const Problem& p);

// Of a tensor with `planes` numbers at each pixel of a head, and at each of its windows.
Size pixel_size(const Problem& p, int64_t planes);
Size window_size(const Problem& p, int64_t planes);

// The tables behind a geometry.
struct Tables {
  std::vector<int64_t> tap_offset;
  std::vector<ColumnPhase> phases;
  std::vector<Edge> edges;
};

// `tensors` are those of the call, some without data.
Geometry make_geometry(const Problem& p, std::initializer_list<const Tensor*> tensors,
                       Tables& tables);

// Tasks enough for the threads to end together; each chunk of rows repeats the work of its halo,
// so no more of them than needed. Results do not depend on it.
void set_chunks(Geometry& g, int64_t rows, int64_t threads);

int64_t count_tasks(const Geometry& g);

// A band of rows for each thread, as a bound in floating point, which does not overflow.
bool affordable(const Geometry& g);

// The place in a key row of a column that counts from the first reflected one.
int64_t key_place(const Geometry& g, int64_t padded);

}  // namespace acmix
