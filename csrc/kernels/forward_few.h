// The forward pass for a handful of tokens: several are still the vector dimension, in the smallest vector that holds
// them; for one it is connections. Rows are split over threads.
#pragma once
#include <omp.h>

#include "buffer.h"
#include "kernels.h"
#include "partition.h"

namespace rarefy::RAREFY_ISA {

constexpr int kFewTokens = 8;

typedef float Float2 __attribute__((vector_size(8), may_alias));
typedef float Float4 __attribute__((vector_size(16), may_alias));
typedef float Float8 __attribute__((vector_size(32), may_alias));

typedef float UnalignedFloat8 __attribute__((vector_size(32), may_alias, aligned(4)));
typedef int32_t Int8 __attribute__((vector_size(32), may_alias));

// Products of as many rows at a time as stay in the first-level cache, but of one row at least.
RAREFY_INLINE int products_at_once(const Panels& w) { return max_of(2048, w.width); }

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

// lanes[row] += products of the row. A mispredicted branch costs more than idle lanes: each row takes `vectors` vectors,
// which hold nearly all rows, and only what is left takes a loop.
RAREFY_INLINE void add_rows(const int32_t* starts, Range rows, const float* products, int vectors, Float8* lanes) {
  for (int row = rows.begin; row < rows.end; row++) {
    const float* p = products + (starts[row] - starts[rows.begin]);
    int32_t left = starts[row + 1] - starts[row];
    Float8 sum = lanes[row];
    for (int v = 0; v < vectors; v++, p += 8, left -= 8) {
      const Int8 keep = Int8{0, 1, 2, 3, 4, 5, 6, 7} < Int8{} + left;
      const Float8 product = *reinterpret_cast<const UnalignedFloat8*>(p);
      sum += reinterpret_cast<Float8>(reinterpret_cast<Int8>(product) & keep);
    }
    for (; left > 0; left--) sum[0] += *p++;
    lanes[row] = sum;
  }
}

// Vectors of eight that hold the connections of one row in a panel, up to three standard deviations above the mean.
RAREFY_INLINE int vectors_per_row(const Panels& w) {
  const float runs = max_of(int64_t{1}, static_cast<int64_t>(w.count()) * w.rows), mean = w.nonzeros() / runs;
  return min_of(w.width, static_cast<int>(mean + 3 * __builtin_sqrtf(mean))) / 8 + 1;
}

// One token: lanes[row] += W[row] · x, with the products of as many rows at a time as the buffer holds.
__attribute__((noinline)) static void multiply_rows(const Panels& w, Range rows, const float* values, const float* x,
                                                    float* products, Float8* lanes) {
  const int64_t nonzeros = w.nonzeros();
  const int vectors = vectors_per_row(w), most = products_at_once(w);
  for (int p = 0, panels = w.count(); p < panels; p++, x += w.width) {
    const int32_t* starts = w.starts + static_cast<int64_t>(p) * w.rows;
    for (int begin = rows.begin, end = begin; begin < rows.end; begin = end) {
      while (end < rows.end && starts[end + 1] - starts[begin] <= most) end++;
      const int64_t q = starts[begin];
      multiply_inputs(w.offsets + q, values + q, starts[end] - q, nonzeros - q, x, products);
      add_rows(starts, Range{begin, end}, products, vectors, lanes);
    }
  }
}

RAREFY_INLINE float sum_of(Float8 v) {
  const Float4 four = RAREFY_SHUFFLE(v, v, 0, 1, 2, 3) + RAREFY_SHUFFLE(v, v, 4, 5, 6, 7);
  const Float4 two = four + RAREFY_SHUFFLE(four, four, 2, 3, 2, 3);
  return two[0] + two[1];
}

// Several tokens: sums[row] += W[row] · x with x [columns] of T tokens each. Four sums hide the latency of the additions.
template <class T>
void multiply_rows(const Panels& w, Range rows, const float* values, const T* x, T* sums) {
  for (int p = 0, panels = w.count(); p < panels; p++) {
    const int32_t* starts = w.starts + static_cast<int64_t>(p) * w.rows;
    const T* x_panel = x + static_cast<size_t>(p) * w.width;
    for (int row = rows.begin; row < rows.end; row++) {
      int32_t q = starts[row];
      const int32_t end = starts[row + 1];
      T a{}, b{}, c{}, d{};
      for (; q + 4 <= end; q += 4) {
        a += values[q] * x_panel[w.offsets[q]];
        b += values[q + 1] * x_panel[w.offsets[q + 1]];
        c += values[q + 2] * x_panel[w.offsets[q + 2]];
        d += values[q + 3] * x_panel[w.offsets[q + 3]];
      }
      for (; q < end; q++) a += values[q] * x_panel[w.offsets[q]];
      sums[row] += (a + b) + (c + d);
    }
  }
}

// x [tokens, columns] -> [columns][T], missing tokens 0.
template <class T, class Element>
void pack_few(const Element* x, int tokens, int columns, float* target) {
  constexpr int width = sizeof(T) / sizeof(float);
  for (int t = 0; t < width; t++)
    for (int i = 0; i < columns; i++)
      target[static_cast<size_t>(i) * width + t] = t < tokens ? to_float(x[static_cast<int64_t>(t) * columns + i]) : 0.f;
}

template <class T, class Element>
bool forward_few_as(const ForwardCall& c) {
  constexpr int width = sizeof(T) / sizeof(float);
  const Panels& w = c.weight;
  const Buffer x(static_cast<size_t>(w.columns) * sizeof(T)), sums_buffer(static_cast<size_t>(w.rows) * sizeof(T));
  if (!x.ok() || !sums_buffer.ok()) return false;
  float* sums = sums_buffer.as<float>();
  Element* target = static_cast<Element*>(c.y);
  pack_few<T>(static_cast<const Element*>(c.x), static_cast<int>(c.tokens), w.columns, x.as<float>());
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (int k = 0; k < c.threads; k++) {
    const Range rows = part(w, c.threads, k);
    for (int row = rows.begin; row < rows.end; row++)
      for (int t = 0; t < width; t++) sums[static_cast<size_t>(row) * width + t] = c.bias ? c.bias[row] : 0.f;
    multiply_rows(w, rows, c.values, x.as<T>(), sums_buffer.as<T>());
    for (int t = 0; t < c.tokens; t++)
      for (int row = rows.begin; row < rows.end; row++)
        from_float(sums[static_cast<size_t>(row) * width + t], target + static_cast<int64_t>(t) * w.rows + row);
  }
  return true;
}

template <class Element>
bool forward_one(const ForwardCall& c) {
  const Panels& w = c.weight;
  const size_t room = products_at_once(w) + w.width + 16;  // a row's vectors reach beyond its products
  const Buffer x(w.columns * sizeof(float)), lanes(w.rows * sizeof(Float8));
  const Buffer products(c.threads * room * sizeof(float));
  if (!x.ok() || !lanes.ok() || !products.ok()) return false;
  pack_few<float>(static_cast<const Element*>(c.x), 1, w.columns, x.as<float>());
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (int k = 0; k < c.threads; k++) {
    const Range rows = part(w, c.threads, k);
    Float8* sums = lanes.as<Float8>();
    for (int row = rows.begin; row < rows.end; row++) sums[row] = Float8{};
    multiply_rows(w, rows, c.values, x.as<float>(), products.as<float>() + k * room, sums);
    for (int row = rows.begin; row < rows.end; row++)
      from_float(sum_of(sums[row]) + (c.bias ? c.bias[row] : 0.f), static_cast<Element*>(c.y) + row);
  }
  return true;
}

template <class Element>
bool forward_few(const ForwardCall& c) {
  if (c.tokens == 1) return forward_one<Element>(c);
  if (c.tokens == 2) return forward_few_as<Float2, Element>(c);
  if (c.tokens <= 4) return forward_few_as<Float4, Element>(c);
  return forward_few_as<Float8, Element>(c);
}

}  // namespace rarefy::RAREFY_ISA
