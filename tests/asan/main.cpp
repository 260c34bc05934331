// Runs every entry point of the CPU kernel over a grid of shapes and layouts, on buffers without a
// spare byte, for a build with the address and undefined-behaviour sanitizers (`make asan`).

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "partition_attention/job.h"
#include "shift_convolution/job.h"
#include "sliding/job.h"

using acmix::PartitionProblem;
using acmix::Problem;
using acmix::ShiftProblem;
using acmix::Tensor;

extern "C" {
const char* acmix_simd();
int acmix_attention_forward(const Problem*, const Tensor* q, const Tensor* k, const Tensor* v,
                            const float* position, const float* alpha, const Tensor* out,
                            float* lse, int64_t threads);
int acmix_attention_backward(const Problem*, const Tensor* grad_out, const Tensor* q,
                             const Tensor* k, const Tensor* v, const float* position,
                             const float* alpha, const float* lse, const Tensor* grad_q,
                             const Tensor* grad_k, const Tensor* grad_v, float* grad_position,
                             float* grad_alpha, int64_t threads);
int acmix_aggregation_forward(const Problem*, const Tensor* weight, const Tensor* v,
                              const Tensor* out, int64_t threads);
int acmix_aggregation_backward(const Problem*, const Tensor* grad_out, const Tensor* weight,
                               const Tensor* v, const Tensor* grad_weight, const Tensor* grad_v,
                               int64_t threads);
int acmix_shift_forward(const ShiftProblem*, const Tensor* pieces, const float* combine,
                        const float* weight, const Tensor* out, int64_t threads);
int acmix_shift_backward(const ShiftProblem*, const Tensor* grad_out, const Tensor* pieces,
                         const float* combine, const float* weight, const Tensor* grad_pieces,
                         float* grad_weight, float* grad_combine, int64_t threads);
int acmix_partition_forward(const PartitionProblem*, const Tensor* q, const Tensor* k,
                            const Tensor* v, const float* bias, const Tensor* out, float* lse,
                            int64_t threads);
int acmix_partition_backward(const PartitionProblem*, const Tensor* grad_out, const Tensor* q,
                             const Tensor* k, const Tensor* v, const float* bias,
                             const float* lse, const Tensor* grad_q, const Tensor* grad_k,
                             const Tensor* grad_v, float* grad_bias, int64_t threads);
}

namespace {

std::mt19937 random_bits(0);

// The order of dimensions in memory, the last one densest.
using Order = std::array<int, 5>;
constexpr Order kOrders[] = {
    {0, 1, 2, 3, 4},  // heads, channels, rows, columns
    {0, 2, 1, 3, 4},  // channels first
    {0, 3, 4, 1, 2},  // a pixel's channels together
    {0, 3, 4, 2, 1},  // a pixel's heads together
    {4, 3, 2, 1, 0},  // none of these
};

struct Buffer {
  Tensor tensor{};
  std::unique_ptr<char[]> memory;

  Buffer(std::array<int64_t, 5> size, const Order& order, int32_t dtype, bool fill) {
    int64_t count = 1;
    for (int i = 4; i >= 0; i--) {
      tensor.size[order[i]] = size[order[i]];
      tensor.stride[order[i]] = count;
      count *= size[order[i]];
    }
    const size_t bytes = static_cast<size_t>(count) * (dtype == acmix::kFloat32 ? 4 : 2);
    memory.reset(new char[bytes]);
    tensor.data = memory.get();
    tensor.extent = count;
    tensor.dtype = dtype;
    for (int64_t i = 0; fill && i < count; i++) set(i);
  }

  // Any small number will do, so the 16-bit types get bits that mean less than 2 in both.
  void set(int64_t i) {
    const float value = static_cast<float>(random_bits() % 2000) / 1000.0f - 1.0f;
    if (tensor.dtype == acmix::kFloat32) {
      static_cast<float*>(tensor.data)[i] = value;
    } else {
      static_cast<uint16_t*>(tensor.data)[i] = static_cast<uint16_t>(random_bits() % 0x3c00);
    }
  }

  // One element infinite, or NaN.
  void spoil() const {
    if (tensor.dtype == acmix::kFloat32) {
      static_cast<float*>(tensor.data)[0] = INFINITY;
    } else {
      static_cast<uint16_t*>(tensor.data)[0] = 0x7f80;
    }
  }

  bool finite() const {
    if (tensor.dtype != acmix::kFloat32) return true;
    for (int64_t i = 0; i < tensor.extent; i++) {
      if (!std::isfinite(static_cast<const float*>(tensor.data)[i])) return false;
    }
    return true;
  }
};

// A bare array of halves, null where it is empty.
struct Floats {
  std::unique_ptr<float[]> memory;
  int64_t count;

  explicit Floats(int64_t size) : memory(size > 0 ? new float[size] : nullptr), count(size) {
    for (int64_t i = 0; i < count; i++) memory[i] = 0.5f;
  }
  float* get() const { return memory.get(); }
  bool finite() const {
    for (int64_t i = 0; i < count; i++) {
      if (!std::isfinite(memory[i])) return false;
    }
    return true;
  }
};

void require(bool condition, const char* what, const Problem& p) {
  if (condition) return;
  std::printf("%s: %ld x %ld, window %ld, stride %ld, dilation %ld, %ld channels\n", what,
              static_cast<long>(p.height), static_cast<long>(p.width),
              static_cast<long>(p.window), static_cast<long>(p.stride),
              static_cast<long>(p.dilation), static_cast<long>(p.channels));
  std::exit(1);
}

void run(const Problem& p, const Order& order, int32_t dtype) {
  const int64_t rows = (p.height + p.stride - 1) / p.stride;
  const int64_t columns = (p.width + p.stride - 1) / p.stride;
  const std::array<int64_t, 5> out_size{p.batch, p.heads, p.channels, rows, columns};
  const std::array<int64_t, 5> key_size{p.batch, p.heads, p.channels, p.height, p.width};
  const std::array<int64_t, 5> weight_size{p.batch, p.heads, p.window * p.window, rows, columns};
  const Buffer q(out_size, order, dtype, true), k(key_size, order, dtype, true);
  const Buffer v(key_size, order, dtype, true), grad_out(out_size, order, dtype, true);
  const Buffer weight(weight_size, order, dtype, true);
  const Buffer out(out_size, order, dtype, false), grad_q(out_size, order, dtype, false);
  const Buffer grad_k(key_size, order, dtype, false), grad_v(key_size, order, dtype, false);
  const Buffer grad_weight(weight_size, order, dtype, false);
  const std::unique_ptr<float[]> lse(new float[p.batch * p.heads * rows * columns]);
  const std::unique_ptr<float[]> position(new float[2 * p.channels]());
  const std::unique_ptr<float[]> grad_position(new float[2 * p.channels]);
  const float alpha = 0.5f;
  float grad_alpha = NAN;
  int status = acmix_attention_forward(&p, &q.tensor, &k.tensor, &v.tensor, position.get(), &alpha,
                                       &out.tensor, lse.get(), 2);
  require(status == 0 && out.finite(), "attention, forward", p);
  status = acmix_attention_backward(&p, &grad_out.tensor, &q.tensor, &k.tensor, &v.tensor,
                                    position.get(), &alpha, lse.get(), &grad_q.tensor,
                                    &grad_k.tensor, &grad_v.tensor, grad_position.get(),
                                    &grad_alpha, 2);
  require(status == 0 && grad_q.finite() && grad_k.finite() && grad_v.finite() &&
              std::isfinite(grad_alpha),
          "attention, backward", p);
  status = acmix_aggregation_forward(&p, &weight.tensor, &v.tensor, &out.tensor, 2);
  require(status == 0 && out.finite(), "aggregation, forward", p);
  status = acmix_aggregation_backward(&p, &grad_out.tensor, &weight.tensor, &v.tensor,
                                      &grad_weight.tensor, &grad_v.tensor, 2);
  require(status == 0 && grad_weight.finite() && grad_v.finite(), "aggregation, backward", p);
}

void run_shift(ShiftProblem p, const Order& order, int32_t dtype) {
  const int64_t rows = (p.height + p.stride - 1) / p.stride;
  const int64_t columns = (p.width + p.stride - 1) / p.stride;
  const std::array<int64_t, 5> out_size{p.batch, p.groups, p.outputs, rows, columns};
  const std::array<int64_t, 5> in_size{p.batch, p.groups, p.pieces, p.height, p.width};
  const Buffer pieces(in_size, order, dtype, true), grad_out(out_size, order, dtype, true);
  const Buffer out(out_size, order, dtype, false), grad_pieces(in_size, order, dtype, false);
  const bool combines = p.pieces != p.inputs;
  const Floats combine(combines ? p.inputs * p.pieces : 0);
  const Floats grad_combine(combines ? p.inputs * p.pieces : 0);
  const int64_t count = p.groups * p.outputs * p.inputs * p.window * p.window;
  const Floats weight(count), grad_weight(count);
  const Problem described{p.batch,  p.groups, p.inputs, p.height,
                          p.width, p.window, p.stride, p.dilation};
  // The third time for memory alone: what is not finite takes paths of its own.
  for (const bool spoilt : {false, false, true}) {
    if (spoilt) {
      pieces.spoil();
      weight.get()[0] = INFINITY;
      if (combines) combine.get()[0] = INFINITY;
    }
    int status = acmix_shift_forward(&p, &pieces.tensor, combine.get(), weight.get(), &out.tensor,
                                     2);
    require(status == 0 && (spoilt || out.finite()), "shift convolution, forward", described);
    status = acmix_shift_backward(&p, &grad_out.tensor, &pieces.tensor, combine.get(),
                                  weight.get(), &grad_pieces.tensor, grad_weight.get(),
                                  grad_combine.get(), 2);
    require(status == 0 && (spoilt || (grad_pieces.finite() && grad_weight.finite() &&
                                       grad_combine.finite())),
            "shift convolution, backward", described);
    p.accumulate = 1;
  }
}

void run_partition(const PartitionProblem& p, const Order& order, int32_t dtype) {
  const std::array<int64_t, 5> size{p.batch, p.heads, p.channels, p.height, p.width};
  const Buffer q(size, order, dtype, true), k(size, order, dtype, true);
  const Buffer v(size, order, dtype, true), grad_out(size, order, dtype, true);
  const Buffer out(size, order, dtype, false), grad_q(size, order, dtype, false);
  const Buffer grad_k(size, order, dtype, false), grad_v(size, order, dtype, false);
  const int64_t tokens = p.rows * p.columns;
  const Floats bias(p.heads * tokens * tokens), grad_bias(p.heads * tokens * tokens);
  const Floats lse(p.batch * p.heads * p.height * p.width);
  const Problem described{p.batch, p.heads, p.channels, p.height, p.width, p.rows, 1, 1};
  for (const bool spoilt : {false, true}) {
    if (spoilt) v.spoil();
    int status = acmix_partition_forward(&p, &q.tensor, &k.tensor, &v.tensor, bias.get(),
                                         &out.tensor, lse.get(), 2);
    require(status == 0 && (spoilt || (out.finite() && lse.finite())), "windows, forward",
            described);
    status = acmix_partition_backward(&p, &grad_out.tensor, &q.tensor, &k.tensor, &v.tensor,
                                      bias.get(), lse.get(), &grad_q.tensor, &grad_k.tensor,
                                      &grad_v.tensor, grad_bias.get(), 2);
    require(status == 0 && (spoilt || (grad_q.finite() && grad_k.finite() && grad_v.finite() &&
                                       grad_bias.finite())),
            "windows, backward", described);
  }
}

}  // namespace

int main() {
  constexpr int64_t sizes[][2] = {{1, 1}, {1, 9}, {8, 1}, {2, 2}, {3, 5}, {7, 7}, {14, 14},
                                  {9, 35}, {30, 6}};
  int64_t cases = 0;
  for (const auto& size : sizes) {
    for (const int64_t window : {1, 3, 7, 13}) {
      for (const int64_t stride : {1, 2, 3}) {
        for (const int64_t dilation : {1, 2, 5}) {
          for (const Order& order : kOrders) {
            const int64_t heads = 1 + cases % 5, channels = 1 + cases % 9;
            const int32_t dtype = static_cast<int32_t>(cases % 3);
            run({2, heads, channels, size[0], size[1], window, stride, dilation}, order, dtype);
            const int64_t outputs = 1 + cases % 6, batch = 1 + cases % 4;
            for (const int64_t inputs : {channels, channels + 1}) {
              run_shift({batch, heads, channels, inputs, outputs, size[0], size[1], window, stride,
                         dilation, 0},
                        order, dtype);
            }
            cases++;
          }
        }
      }
    }
  }
  // Rows in several chunks, and small images together.
  for (const Order& order : kOrders) {
    for (const int64_t stride : {1, 2}) {
      for (const int64_t inputs : {12, 9}) {
        run_shift({1, 5, 12, inputs, 4, 70, 60, 3, stride, 1, 0}, order, acmix::kFloat32);
        run_shift({40, 3, 12, inputs, 4, 5, 6, 5, stride, 1, 0}, order, acmix::kFloat32);
        cases += 2;
      }
    }
    for (const int64_t rows : {1, 2, 7}) {
      for (const int64_t columns : {1, 4, 5}) {
        const int32_t dtype = static_cast<int32_t>(cases % 3);
        const int64_t channels = 1 + 8 * (cases % 5);
        run_partition({2, 3, channels, 3 * rows, 2 * columns, rows, columns, rows / 2,
                       columns / 2},
                      order, dtype);
        cases++;
      }
    }
    run_partition({70, 1, 5, 4, 2, 2, 2, 1, 0}, order, acmix::kFloat32);
    cases++;
  }
  std::printf("%ld cases, %s\n", static_cast<long>(cases), acmix_simd());
}
