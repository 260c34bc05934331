// The C interface of windowed attention.

#include <cmath>
#include <vector>

#include "api/run.h"
#include "sliding/geometry.h"
#include "sliding/reflect.h"
#include "window_attention/job.h"

namespace acmix {
namespace {

constexpr const Kernels<Attention>* kVariants[] = ACMIX_VARIANTS(attention);

// linspace(-1, 1, size), as the reference takes it: from both ends to the middle.
std::vector<float> location(int64_t size) {
  std::vector<float> at(static_cast<size_t>(size), -1.0f);
  const float step = size > 1 ? 2.0f / static_cast<float>(size - 1) : 0.0f;
  for (int64_t i = 0; i < size; i++) {
    const bool first_half = i < size / 2 || size == 1;
    at[static_cast<size_t>(i)] = first_half ? -1.0f + step * static_cast<float>(i)
                                            : 1.0f - step * static_cast<float>(size - 1 - i);
  }
  return at;
}

// The position of every place of a key row, 0 where there is no column.
std::vector<float> key_location(const Geometry& g) {
  const std::vector<float> columns = location(g.width);
  std::vector<float> at(static_cast<size_t>(g.key_pitch), 0.0f);
  for (int64_t padded = 0; padded < g.padded_width; padded++) {
    at[static_cast<size_t>(key_place(g, padded))] =
        columns[static_cast<size_t>(reflect(padded - g.column_pad, g.width))];
  }
  return at;
}

// The tables behind a job.
struct AttentionTables {
  Tables window;
  std::vector<float> columns, rows;
};

// What both passes are given.
Attention make_job(const Problem& p, const Tensor& q, const Tensor& k, const Tensor& v,
                   const float* position, const float* alpha) {
  Attention job{};
  job.query = q;
  job.key = k;
  job.value = v;
  job.position = position;
  job.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.channels)));
  job.alpha = alpha ? *alpha : 1.0f;
  return job;
}

// Adds what follows from the sizes; the job keeps pointers into the tables.
void make_tables(const Problem& p, Attention& job, AttentionTables& tables) {
  job.g = make_geometry(p,
                        {&job.query, &job.key, &job.value, &job.out, &job.grad_out,
                         &job.grad_query, &job.grad_key, &job.grad_value},
                        tables.window);
  tables.columns = key_location(job.g);
  tables.rows = location(p.height);
  job.column_location = tables.columns.data();
  job.row_location = tables.rows.data();
}

int run(const Attention& job, const Kernel<Attention>& kernel, int64_t threads) {
  if (!affordable(job.g)) return kNoMemory;
  return run(job, kernel, count_tasks(job.g), threads);
}

float sum_of(const std::vector<float>& values) {
  double total = 0.0;
  for (float value : values) total += value;
  return static_cast<float>(total);
}

void sum_position_gradient(const Geometry& g, const std::vector<float>& by_row, float* sums) {
  const size_t width = static_cast<size_t>(g.channels) * 2;
  std::vector<double> total(width, 0.0);
  for (size_t i = 0; i < by_row.size(); i++) total[i % width] += by_row[i];
  for (size_t i = 0; i < width; i++) sums[i] = static_cast<float>(total[i]);
}

// Fills the sums of the gradients too.
int run_backward(const Problem& p, Attention& job, float* grad_position, float* grad_alpha,
                 int64_t threads) {
  AttentionTables tables;
  make_tables(p, job, tables);
  set_chunks(job.g, job.g.height, threads);
  std::vector<float> position_by_row, alpha_by_row;
  if (grad_position) {
    const int64_t rows = p.batch * p.heads * p.height;
    position_by_row.resize(static_cast<size_t>(rows * p.channels * 2));
    job.grad_position_by_row = position_by_row.data();
  }
  if (grad_alpha) {
    alpha_by_row.resize(static_cast<size_t>(p.batch * p.heads * job.g.out_height));
    job.grad_alpha_by_row = alpha_by_row.data();
  }
  const int status = run(job, kernels_of(kVariants).backward, threads);
  if (grad_position) sum_position_gradient(job.g, position_by_row, grad_position);
  if (grad_alpha) *grad_alpha = sum_of(alpha_by_row);
  return status;
}

}  // namespace

// `alpha` is a factor of the output, 1 where it is null.
ACMIX_EXPORT int acmix_attention_forward(const Problem* p, const Tensor* q, const Tensor* k,
                                         const Tensor* v, const float* position,
                                         const float* alpha, const Tensor* out, float* lse,
                                         int64_t threads) {
  if (!sane(*p)) return kBadProblem;
  if (!fit({q, out}, window_size(*p, p->channels)) || !fit({k, v}, pixel_size(*p, p->channels))) {
    return kBadTensor;
  }
  return guarded([&] {
    Attention job = make_job(*p, *q, *k, *v, position, alpha);
    job.out = *out;
    job.lse = lse;
    AttentionTables tables;
    make_tables(*p, job, tables);
    set_chunks(job.g, job.g.out_height, threads);
    return run(job, kernels_of(kVariants).forward, threads);
  });
}

ACMIX_EXPORT int acmix_attention_backward(const Problem* p, const Tensor* grad_out,
                                          const Tensor* q, const Tensor* k, const Tensor* v,
                                          const float* position, const float* alpha,
                                          const float* lse, const Tensor* grad_q,
                                          const Tensor* grad_k, const Tensor* grad_v,
                                          float* grad_position, float* grad_alpha,
                                          int64_t threads) {
  if (!sane(*p)) return kBadProblem;
  if (!fit({q, grad_out, grad_q}, window_size(*p, p->channels)) ||
      !fit({k, v, grad_k, grad_v}, pixel_size(*p, p->channels)) || (!lse && p->batch > 0)) {
    return kBadTensor;
  }
  return guarded([&] {
    Attention job = make_job(*p, *q, *k, *v, position, alpha);
    job.grad_out = *grad_out;
    job.grad_query = *grad_q;
    job.grad_key = *grad_k;
    job.grad_value = *grad_v;
    job.lse = const_cast<float*>(lse);
    return run_backward(*p, job, grad_position, grad_alpha, threads);
  });
}

}  // namespace acmix
