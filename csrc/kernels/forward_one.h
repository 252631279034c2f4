// The forward pass for one token: connections are the vector dimension. Rows are split over threads.
#pragma once
#include <omp.h>

#include "buffer.h"
#include "kernels.h"
#include "lookup.h"
#include "partition.h"

namespace rarefy::RAREFY_ISA {

typedef float Float4 __attribute__((vector_size(16), may_alias));
typedef float Float8 __attribute__((vector_size(32), may_alias));
typedef float UnalignedFloat8 __attribute__((vector_size(32), may_alias, aligned(4)));
typedef int32_t Int8 __attribute__((vector_size(32), may_alias));

constexpr int kMostUnrolled = 8;

// Products of as many rows at a time as stay in the first-level cache, but of one row at least.
RAREFY_INLINE int products_at_once(const Layout& w) { return max_of(2048, w.width); }

RAREFY_INLINE Float8 eight_inputs(const uint16_t* offsets, const float* x) {
  const FourOffsets a(offsets), b(offsets + 4);
  return Float8{x[a.get<0>()], x[a.get<1>()], x[a.get<2>()], x[a.get<3>()],
                x[b.get<0>()], x[b.get<1>()], x[b.get<2>()], x[b.get<3>()]};
}

// products[q] = values[q] · x[offsets[q]], whatever rows they belong to; up to seven more where `readable` allows.
RAREFY_INLINE void multiply_inputs(const uint16_t* offsets, const float* values, int64_t count, int64_t readable,
                                   const float* x, float* products) {
  int64_t q = 0;
  for (; q < count && q + 8 <= readable; q += 8)
    *reinterpret_cast<UnalignedFloat8*>(products + q) =
        eight_inputs(offsets + q, x) * *reinterpret_cast<const UnalignedFloat8*>(values + q);
  for (; q < count; q++) products[q] = values[q] * x[offsets[q]];
}

// The first `left` of the eight numbers at p, then zeros.
RAREFY_INLINE Float8 first_of(const float* p, int32_t left) {
  const Int8 keep = Int8{0, 1, 2, 3, 4, 5, 6, 7} < Int8{} + left;
  const Float8 eight = *reinterpret_cast<const UnalignedFloat8*>(p);
  return reinterpret_cast<Float8>(reinterpret_cast<Int8>(eight) & keep);
}

// lanes[row] += products of the row. A mispredicted branch costs more than idle lanes: each row takes kVectors vectors,
// which hold nearly all rows, and only what is left takes a loop.
template <int kVectors>
void add_rows(const int32_t* starts, Range rows, const float* products, Float8* lanes) {
  for (int row = rows.begin; row < rows.end; row++) {
    const float* p = products + (starts[row] - starts[rows.begin]);
    const int32_t count = starts[row + 1] - starts[row];
    Float8 sum = lanes[row], other{};
    RAREFY_UNROLL
    for (int v = 0; v < kVectors; v++) (v % 2 ? other : sum) += first_of(p + 8 * v, count - 8 * v);
    for (int q = 8 * kVectors; q < count; q += 8) sum += first_of(p + q, count - q);
    lanes[row] = sum + other;
  }
}

// Vectors of eight that hold the connections of one row in a panel, up to three standard deviations above the mean.
RAREFY_INLINE int vectors_per_row(const Layout& w) {
  const float runs = max_of(int64_t{1}, static_cast<int64_t>(w.count()) * w.rows), mean = w.nonzeros() / runs;
  return (min_of(w.width, static_cast<int>(mean + 3 * __builtin_sqrtf(mean))) + 7) / 8;
}

// One panel: lanes[row] += W[row] · x, with the products of as many rows at a time as the buffer holds.
template <int kVectors>
void multiply_panel(const Layout& w, int panel, Range rows, const float* values, const float* x, float* products,
                    Float8* lanes) {
  const int32_t* starts = w.starts + static_cast<int64_t>(panel) * w.rows;
  const int64_t nonzeros = w.nonzeros(), most = products_at_once(w);
  for (int begin = rows.begin, end = begin; begin < rows.end; begin = end) {
    while (end < rows.end && starts[end + 1] - starts[begin] <= most) end++;
    const int64_t q = starts[begin], count = starts[end] - q;
    const int64_t done = look_up_and_multiply(w.width, w.offsets + q, values + q, count, nonzeros - q, x, products);
    if (done < count)
      multiply_inputs(w.offsets + q + done, values + q + done, count - done, nonzeros - q - done, x, products + done);
    add_rows<kVectors>(starts, Range{begin, end}, products, lanes);
  }
}

RAREFY_INLINE float sum_of(Float8 v) {
  const Float4 four = RAREFY_SHUFFLE(v, v, 0, 1, 2, 3) + RAREFY_SHUFFLE(v, v, 4, 5, 6, 7);
  const Float4 two = four + RAREFY_SHUFFLE(four, four, 2, 3, 2, 3);
  return two[0] + two[1];
}

// All panels, with the number of vectors as a constant.
template <int kVectors>
void multiply_panels(const Layout& w, int vectors, Range rows, const float* values, const float* x, float* products,
                     Float8* lanes) {
  if constexpr (kVectors < kMostUnrolled)
    if (vectors > kVectors) return multiply_panels<kVectors + 1>(w, vectors, rows, values, x, products, lanes);
  for (int p = 0, panels = w.count(); p < panels; p++)
    multiply_panel<kVectors>(w, p, rows, values, x + static_cast<int64_t>(p) * w.width, products, lanes);
}

template <class Element>
bool forward_one(const ForwardCall& c) {
  const Layout& w = c.weight;
  // A row's vectors and a look-up reach beyond the products, a table beyond the inputs.
  const size_t room = (products_at_once(w) + max_of(w.width, 8 * kMostUnrolled) + kLookedUp + 15) / 16 * 16;
  const Buffer x((w.columns + kMostInputs) * sizeof(float)), lanes(w.rows * sizeof(Float8));
  const Buffer products(c.threads * room * sizeof(float));
  if (!x.ok() || !lanes.ok() || !products.ok()) return false;
  for (int i = 0; i < w.columns; i++) x.as<float>()[i] = to_float(static_cast<const Element*>(c.x)[i]);
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (int k = 0; k < c.threads; k++) {
    const Range rows = part(w, c.threads, k);
    Float8* sums = lanes.as<Float8>();
    for (int row = rows.begin; row < rows.end; row++) sums[row] = Float8{};
    multiply_panels<1>(w, vectors_per_row(w), rows, c.values, x.as<float>(), products.as<float>() + k * room, sums);
    for (int row = rows.begin; row < rows.end; row++)
      from_float(sum_of(sums[row]) + (c.bias ? c.bias[row] : 0.f), static_cast<Element*>(c.y) + row);
  }
  return true;
}

}  // namespace rarefy::RAREFY_ISA
