// Tables of what is compiled for each instruction set. Only for kernels, see vec.h.
#pragma once

#include "common/job.h"
#include "simd/scratch.h"

#define ACMIX_JOIN(a, b) a##_##b
#define ACMIX_NAME(name, isa) ACMIX_JOIN(name, isa)
// The kernels of the operator `name` for the instruction set that this file is compiled for.
#define ACMIX_KERNELS(name) ACMIX_NAME(name, ACMIX_ISA)

namespace {

template <class S, class Geometry>
int64_t scratch_size(const Geometry& g) {
  Scratch scratch(nullptr);
  S layout(scratch, g);
  return scratch.used();
}

// A task that lays out its scratch as S does.
template <class S, class Job>
constexpr acmix::Kernel<Job> kernel(void (*task)(const Job&, int64_t, float*)) {
  return {scratch_size<S, decltype(Job::g)>, task};
}

// A function for each size of a block in registers, `of[rows - 1][columns - 1]`.
template <class Function, int Rows, int Columns>
struct Table {
  Function of[Rows][Columns];
};

// The functions are Sizes::at<row, column>, from 1 on.
template <class Sizes, int I = 0, class Function, int Rows, int Columns>
constexpr void fill_table(Table<Function, Rows, Columns>& table) {
  if constexpr (I < Rows * Columns) {
    table.of[I / Columns][I % Columns] = Sizes::template at<I / Columns + 1, I % Columns + 1>;
    fill_table<Sizes, I + 1>(table);
  }
}

template <class Sizes, class Function, int Rows, int Columns>
constexpr Table<Function, Rows, Columns> make_table() {
  Table<Function, Rows, Columns> table{};
  fill_table<Sizes>(table);
  return table;
}

}  // namespace
