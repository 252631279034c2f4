// Layer normalisation of float32 whose result is bfloat16, as products under autocast take it, and the sum of a stream of
// float32 and a part of bfloat16. torch makes a copy in the other type for each of these.
#include <omp.h>

#include "buffer.h"
#include "kernels.h"
#include "operations.h"
#include "partition.h"

namespace rarefy::RAREFY_ISA {
namespace {

// One row at a time stays in the nearest cache, so that it is read several times at no cost.
struct Row {
  const float* x;
  int columns;

  int whole() const { return columns / kLanes * kLanes; }

  // The mean of f of each entry. Four sums, for one would wait for itself.
  template <class Function>
  RAREFY_INLINE float mean_of(const Row& row, Function f) {
    Vec sums[4]{};
    const float* x = row.x;
    int i = 0;
    for (; i + 4 * kLanes <= row.columns; i += 4 * kLanes)
      RAREFY_UNROLL for (int k = 0; k < 4; k++) sums[k] += f(load(x + i + k * kLanes));
    for (; i + kLanes <= row.columns; i += kLanes) sums[0] += f(load(x + i));
    float rest = 0;
    for (; i < row.columns; i++) rest += f(Vec{} + x[i])[0];
    return (lane_sum(sums[0] + sums[1] + (sums[2] + sums[3])) + rest) / static_cast<float>(row.columns);
  }
  float mean() const {
    return mean_of(*this, [](Vec v) __attribute__((always_inline)) { return v; });
  }
  float variance(float mean) const {
    return mean_of(*this, [mean](Vec v) __attribute__((always_inline)) { return (v - mean) * (v - mean); });
  }
};

// (x - mean) / deviation * weight + bias
void normalise(const NormCall& c, int64_t row) {
  const Row r{c.x + row * c.columns, c.columns};
  const float mean = r.mean(), inverse = 1.f / __builtin_sqrtf(r.variance(mean) + c.epsilon);
  c.statistics[2 * row] = mean;
  c.statistics[2 * row + 1] = inverse;
  Bfloat16* y = static_cast<Bfloat16*>(c.y) + row * c.columns;
  for (int i = 0; i < r.whole(); i += kLanes) {
    Vec v = (load(r.x + i) - mean) * inverse;
    if (c.weight) v *= load(c.weight + i);
    if (c.bias) v += load(c.bias + i);
    store(y + i, v);
  }
  for (int i = r.whole(); i < c.columns; i++) {
    float v = (r.x[i] - mean) * inverse;
    if (c.weight) v *= c.weight[i];
    if (c.bias) v += c.bias[i];
    from_float(v, y + i);
  }
}

// What the gradient of a row adds to those of weight and bias, and its means: of slopes, and of slopes * normalised x.
struct Slopes {
  float mean, product;
};

Slopes add_slopes(const NormBackwardCall& c, int64_t row, float* of_weight, float* of_bias) {
  const Row r{c.x + row * c.columns, c.columns};
  const float mean = c.statistics[2 * row], inverse = c.statistics[2 * row + 1];
  const Bfloat16* grad = static_cast<const Bfloat16*>(c.grad) + row * c.columns;
  Vec sum{}, product{};
  float rest = 0, rest_product = 0;
  for (int i = 0; i < r.whole(); i += kLanes) {
    const Vec g = load(grad + i), x = (load(r.x + i) - mean) * inverse, s = c.weight ? g * load(c.weight + i) : g;
    store(of_weight + i, load(of_weight + i) + g * x);
    store(of_bias + i, load(of_bias + i) + g);
    sum += s;
    product += s * x;
  }
  for (int i = r.whole(); i < c.columns; i++) {
    const float g = to_float(grad[i]), x = (r.x[i] - mean) * inverse, s = c.weight ? g * c.weight[i] : g;
    of_weight[i] += g * x;
    of_bias[i] += g;
    rest += s;
    rest_product += s * x;
  }
  const float count = static_cast<float>(c.columns);
  return {(lane_sum(sum) + rest) / count, (lane_sum(product) + rest_product) / count};
}

void write_grad(const NormBackwardCall& c, int64_t row, Slopes means) {
  const Row r{c.x + row * c.columns, c.columns};
  const float mean = c.statistics[2 * row], inverse = c.statistics[2 * row + 1];
  const Bfloat16* grad = static_cast<const Bfloat16*>(c.grad) + row * c.columns;
  float* out = c.grad_x + row * c.columns;
  for (int i = 0; i < r.whole(); i += kLanes) {
    const Vec g = load(grad + i), x = (load(r.x + i) - mean) * inverse, s = c.weight ? g * load(c.weight + i) : g;
    store(out + i, (s - means.mean - x * means.product) * inverse);
  }
  for (int i = r.whole(); i < c.columns; i++) {
    const float g = to_float(grad[i]), x = (r.x[i] - mean) * inverse, s = c.weight ? g * c.weight[i] : g;
    out[i] = (s - means.mean - x * means.product) * inverse;
  }
}

void add_row_sums(const float* sums, int threads, int columns, float* out) {
  if (!out) return;
  for (int i = 0; i < columns; i++) {
    float sum = 0;
    for (int k = 0; k < threads; k++) sum += sums[static_cast<size_t>(2 * k) * columns + i];
    out[i] = sum;
  }
}

constexpr int64_t kCost = 8;  // multiply-adds an entry

}  // namespace

void norm_forward(const NormCall& c) {
  const int threads = useful_threads(c.threads, c.rows * c.columns * kCost);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int k = 0; k < threads; k++)
    for (int64_t row = share_begin(c.rows, threads, k), end = share_begin(c.rows, threads, k + 1); row < end; row++)
      normalise(c, row);
}

bool norm_backward(const NormBackwardCall& c) {
  const int threads = useful_threads(c.threads, c.rows * c.columns * kCost);
  const size_t per_thread = 2 * static_cast<size_t>(c.columns);
  const Buffer sums(per_thread * threads * sizeof(float));
  if (!sums.ok()) return false;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int k = 0; k < threads; k++) {
    float* of_weight = sums.as<float>() + per_thread * k;
    memset(of_weight, 0, per_thread * sizeof(float));
    for (int64_t row = share_begin(c.rows, threads, k), end = share_begin(c.rows, threads, k + 1); row < end; row++)
      write_grad(c, row, add_slopes(c, row, of_weight, of_weight + c.columns));
  }
  add_row_sums(sums.as<float>(), threads, c.columns, c.grad_weight);
  add_row_sums(sums.as<float>() + c.columns, threads, c.columns, c.grad_bias);
  return true;
}

void add_part(const AddPartCall& c) {
  const int threads = useful_threads(c.threads, c.size * kCost);
  const Bfloat16* part = static_cast<const Bfloat16*>(c.part);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int k = 0; k < threads; k++) {
    int64_t i = share_begin(c.size, threads, k);
    const int64_t end = share_begin(c.size, threads, k + 1);
    for (; i + kLanes <= end; i += kLanes) store(c.sum + i, load(c.stream + i) + load(part + i));
    for (; i < end; i++) c.sum[i] = c.stream[i] + to_float(part[i]);
  }
}

}  // namespace rarefy::RAREFY_ISA
