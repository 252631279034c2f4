// The forward pass of few tokens, which would not pay for turning the weights around: vectors run along the inputs, and a
// weight is loaded once for all tokens.
#pragma once
#include "blocks_chunks.h"
#include "blocks_vectors.h"
#include "buffer.h"

namespace rarefy::RAREFY_ISA {

constexpr int kFewBlockTokens = 4;
constexpr int kFewRows = 4;  // at a time: 16 sums at most

template <int kLength>
RAREFY_INLINE float sum_lanes(typename Lanes<kLength>::Floats v) {
  float sum = 0;
  for (int i = 0; i < kLength; i++) sum += v[i];
  return sum;
}

// kFewRows outputs from `row` on, of kTokens tokens. x is [kTokens, columns].
template <int kLength, int kTokens, class Element>
void multiply_few_rows(const BlocksForwardCall& c, int line, int row, const float* x, Element* y) {
  using V = Lanes<kLength>;
  const BlockShape& s = c.shape;
  typename V::Floats sum[kFewRows][kTokens] = {};
  for (int32_t q = c.by_row.starts[line]; q < c.by_row.starts[line + 1]; q++) {
    const float* w = c.values + q * s.size() + static_cast<int64_t>(row) * s.width;
    const float* input = x + static_cast<int64_t>(c.by_row.indices[q]) * s.width;
    for (int k = 0; k < s.width; k += kLength) {
      typename V::Floats inputs[kTokens];
      RAREFY_UNROLL for (int t = 0; t < kTokens; t++)
        inputs[t] = V::load(input + static_cast<int64_t>(t) * s.columns + k);
      RAREFY_UNROLL for (int r = 0; r < kFewRows; r++) {
        const typename V::Floats weight = V::load(w + static_cast<int64_t>(r) * s.width + k);
        RAREFY_UNROLL for (int t = 0; t < kTokens; t++) sum[r][t] += weight * inputs[t];
      }
    }
  }
  const int64_t output = static_cast<int64_t>(line) * s.height + row;
  RAREFY_UNROLL for (int r = 0; r < kFewRows; r++)
    RAREFY_UNROLL for (int t = 0; t < kTokens; t++)
      from_float((c.bias ? c.bias[output + r] : 0.f) + sum_lanes<kLength>(sum[r][t]), y + t * s.rows + output + r);
}

template <int kLength, int kTokens, class Element>
bool forward_few_tokens(const BlocksForwardCall& c) {
  if constexpr (kTokens < kFewBlockTokens)
    if (c.tokens > kTokens) return forward_few_tokens<kLength, kTokens + 1, Element>(c);
  const int64_t inputs = c.tokens * c.shape.columns;
  const Element* x = static_cast<const Element*>(c.x);
  const Buffer wide(inputs * sizeof(float));
  if (!wide.ok()) return false;
  for (int64_t i = 0; i < inputs; i++) wide.as<float>()[i] = to_float(x[i]);
#pragma omp parallel for schedule(static, 1) num_threads(c.threads)
  for (int part = 0; part < c.threads; part++) {
    const Range lines = line_range(c.by_row, c.threads, part);
    for (int line = lines.begin; line < lines.end; line++)
      for (int row = 0; row < c.shape.height; row += kFewRows)
        multiply_few_rows<kLength, kTokens>(c, line, row, wide.as<float>(), static_cast<Element*>(c.y));
  }
  return true;
}

}  // namespace rarefy::RAREFY_ISA
