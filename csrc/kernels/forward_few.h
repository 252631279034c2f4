// The forward pass for a handful of tokens: several are still the vector dimension, in the smallest vector that holds
// them. Rows are split over threads.
#pragma once
#include <omp.h>

#include "buffer.h"
#include "forward_one.h"
#include "kernels.h"
#include "partition.h"

namespace rarefy::RAREFY_ISA {

constexpr int kFewTokens = 8;

typedef float Float2 __attribute__((vector_size(8), may_alias));

// Several tokens: sums[row] += W[row] · x with x [columns] of T tokens each. Four sums hide the latency of the additions.
template <class T>
void multiply_rows(const Layout& w, Range rows, const float* values, const T* x, T* sums) {
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
  const Layout& w = c.weight;
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
bool forward_few(const ForwardCall& c) {
  if (c.tokens == 1) return forward_one<Element>(c);
  if (c.tokens == 2) return forward_few_as<Float2, Element>(c);
  if (c.tokens <= 4) return forward_few_as<Float4, Element>(c);
  return forward_few_as<Float8, Element>(c);
}

}  // namespace rarefy::RAREFY_ISA
