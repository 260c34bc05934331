// The C interface of weighted aggregation.

#include "api/run.h"
#include "sliding/geometry.h"
#include "weighted_aggregation/job.h"

namespace acmix {
namespace {

constexpr const Kernels<Aggregation>* kVariants[] = ACMIX_VARIANTS(aggregation);

// `rows` are those of what the pass makes: outputs, or values and their gradients.
int run(const Problem& p, Aggregation& job, const Kernel<Aggregation>& kernel, int64_t rows,
        int64_t threads) {
  Tables tables;
  job.g = make_geometry(p,
                        {&job.weight, &job.value, &job.out, &job.grad_out, &job.grad_weight,
                         &job.grad_value},
                        tables);
  set_chunks(job.g, rows, threads);
  if (!affordable(job.g)) return kNoMemory;
  return run(job, kernel, count_tasks(job.g), threads);
}

}  // namespace

// `heads` counts the channels of the weights, `channels` those of the values that share one.
ACMIX_EXPORT int acmix_aggregation_forward(const Problem* p, const Tensor* weight, const Tensor* v,
                                           const Tensor* out, int64_t threads) {
  if (!sane(*p)) return kBadProblem;
  if (!fit({weight}, window_size(*p, p->window * p->window)) ||
      !fit({v}, pixel_size(*p, p->channels)) || !fit({out}, window_size(*p, p->channels))) {
    return kBadTensor;
  }
  return guarded([&] {
    Aggregation job{};
    job.weight = *weight;
    job.value = *v;
    job.out = *out;
    return run(*p, job, kernels_of(kVariants).forward, out->size[3], threads);
  });
}

ACMIX_EXPORT int acmix_aggregation_backward(const Problem* p, const Tensor* grad_out,
                                            const Tensor* weight, const Tensor* v,
                                            const Tensor* grad_weight, const Tensor* grad_v,
                                            int64_t threads) {
  if (!sane(*p)) return kBadProblem;
  if (!fit({weight, grad_weight}, window_size(*p, p->window * p->window)) ||
      !fit({grad_out}, window_size(*p, p->channels)) ||
      !fit({v, grad_v}, pixel_size(*p, p->channels))) {
    return kBadTensor;
  }
  return guarded([&] {
    Aggregation job{};
    job.weight = *weight;
    job.value = *v;
    job.grad_out = *grad_out;
    job.grad_weight = *grad_weight;
    job.grad_value = *grad_v;
    return run(*p, job, kernels_of(kVariants).backward, p->height, threads);
  });
}

}  // namespace acmix
