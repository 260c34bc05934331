// The C interface of attention within windows.

#include <cmath>
#include <vector>

#include "api/arithmetic.h"
#include "api/run.h"
#include "partition_attention/job.h"

namespace acmix {
namespace {

constexpr const Kernels<Partition>* kVariants[] = ACMIX_VARIANTS(partition);

bool sane(const PartitionProblem& p) {
  return sane_sizes({p.heads, p.channels, p.height, p.width, p.rows, p.columns}) &&
         p.batch >= 0 && p.batch <= kLargest && p.rows <= kLargestWindow &&
         p.columns <= kLargestWindow && p.height % p.rows == 0 && p.width % p.columns == 0 &&
         p.row_shift >= 0 && p.row_shift < p.rows && p.column_shift >= 0 &&
         p.column_shift < p.columns;
}

Size map_size(const PartitionProblem& p) {
  return {p.batch, p.heads, p.channels, p.height, p.width};
}

// The bias and, where there are windows, the log-sum-exp of their queries.
bool has_floats(const PartitionProblem& p, const float* bias, const float* lse) {
  return bias && (lse || p.batch == 0);
}

// As many parts as any machine has use for. No word of threads: gradients of the bias are summed
// part by part.
PartitionGeometry make_partition_geometry(const PartitionProblem& p) {
  constexpr int64_t most = 64;
  PartitionGeometry g{};
  g.p = p;
  g.tokens = p.rows * p.columns;
  g.down = p.height / p.rows;
  g.across = p.width / p.columns;
  g.pitch = round_up(g.tokens, 16);
  g.channel_pitch = round_up(p.channels, 16);
  const int64_t rows = p.batch * g.down;
  g.part_rows = rows > most ? ceil_div(rows, most) : 1;
  g.parts = ceil_div(rows, g.part_rows);
  return g;
}

bool affordable(const PartitionGeometry& g) {
  const double tokens = static_cast<double>(g.pitch);
  return tokens * (tokens + static_cast<double>(g.channel_pitch)) < 1e10;
}

int64_t count_tasks(const PartitionGeometry& g) { return g.parts * g.p.heads; }

// What both passes are given, and what follows from the sizes.
Partition make_job(const PartitionProblem& p, const Tensor& q, const Tensor& k, const Tensor& v,
                   const float* bias, const float* lse) {
  Partition job{};
  job.g = make_partition_geometry(p);
  job.query = q;
  job.key = k;
  job.value = v;
  job.bias = bias;
  job.lse = const_cast<float*>(lse);
  job.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.channels)));
  return job;
}

// Fills the sums of the bias's gradient too.
int run_backward(Partition& job, float* grad_bias, int64_t threads) {
  if (!affordable(job.g)) return kNoMemory;
  const size_t size = static_cast<size_t>(job.g.p.heads * job.g.tokens * job.g.tokens);
  std::vector<float> parts(grad_bias ? static_cast<size_t>(job.g.parts) * size : 0);
  job.grad_bias = grad_bias ? parts.data() : nullptr;
  const int status = run(job, kernels_of(kVariants).backward, count_tasks(job.g), threads);
  for (size_t i = 0; grad_bias && i < size; i++) {
    double sum = 0.0;
    for (size_t at = i; at < parts.size(); at += size) sum += parts[at];
    grad_bias[i] = static_cast<float>(sum);
  }
  return status;
}

}  // namespace

ACMIX_EXPORT int acmix_partition_forward(const PartitionProblem* p, const Tensor* q,
                                         const Tensor* k, const Tensor* v, const float* bias,
                                         const Tensor* out, float* lse, int64_t threads) {
  if (!sane(*p)) return kBadProblem;
  if (!fit({q, k, v, out}, map_size(*p)) || !has_floats(*p, bias, lse)) return kBadTensor;
  return guarded([&] {
    Partition job = make_job(*p, *q, *k, *v, bias, lse);
    job.out = *out;
    return affordable(job.g)
               ? run(job, kernels_of(kVariants).forward, count_tasks(job.g), threads)
               : kNoMemory;
  });
}

ACMIX_EXPORT int acmix_partition_backward(const PartitionProblem* p, const Tensor* grad_out,
                                          const Tensor* q, const Tensor* k, const Tensor* v,
                                          const float* bias, const float* lse,
                                          const Tensor* grad_q, const Tensor* grad_k,
                                          const Tensor* grad_v, float* grad_bias,
                                          int64_t threads) {
  if (!sane(*p)) return kBadProblem;
  if (!fit({grad_out, q, k, v, grad_q, grad_k, grad_v}, map_size(*p)) ||
      !has_floats(*p, bias, lse)) {
    return kBadTensor;
  }
  return guarded([&] {
    Partition job = make_job(*p, *q, *k, *v, bias, lse);
    job.grad_out = *grad_out;
    job.grad_query = *grad_q;
    job.grad_key = *grad_k;
    job.grad_value = *grad_v;
    return run_backward(job, grad_bias, threads);
  });
}

}  // namespace acmix
