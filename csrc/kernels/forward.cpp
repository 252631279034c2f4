// y = x · Wᵀ + bias. A nonzero of W costs one broadcast, NV loads and NV fused multiply-adds.
#include <omp.h>

#include "buffer.h"
#include "forward_few.h"
#include "kernels.h"
#include "operations.h"
#include "partition.h"
#include "sorted_rows.h"
#include "tile.h"

namespace rarefy::RAREFY_ISA {
namespace {

template <int NV, class Value>
RAREFY_INLINE void add_product(Value value, const float* x_panel, size_t offset, Vec (&sum)[NV]) {
  const Vec* x = reinterpret_cast<const Vec*>(x_panel + offset * (NV * kLanes));
  RAREFY_UNROLL for (int k = 0; k < NV; k++) sum[k] += value * x[k];
}

// accumulators[row - rows.begin] of one panel: += W[row, panel] · x; the first panel starts from the bias.
template <int NV, bool kSorted>
void multiply_panel(const Matrix& weight, int panel, Range rows, const float* x_panel, const float* bias,
                    float* accumulators) {
  constexpr int T = NV * kLanes;
  const Layout& w = weight.layout;
  const float* values = weight.values;
  const int32_t* starts = w.starts + static_cast<int64_t>(panel) * w.rows;
  const int32_t* order = kSorted ? weight.rows_of(panel) : nullptr;
  for (int i = rows.begin; i < rows.end; i++) {
    const int row = kSorted ? order[i] : i;
    if (kSorted) ask_for<NV>(accumulators + static_cast<size_t>(order[min_of(i + 2, rows.end - 1)] - rows.begin) * T);
    Vec* total = reinterpret_cast<Vec*>(accumulators + static_cast<size_t>(row - rows.begin) * T);
    Vec sum[NV];
    if (panel == 0) {
      const float start = bias ? bias[row] : 0.f;
      RAREFY_UNROLL for (int k = 0; k < NV; k++) sum[k] = Vec{} + start;
    } else {
      RAREFY_UNROLL for (int k = 0; k < NV; k++) sum[k] = total[k];
    }
    int64_t q = starts[i];
    const int64_t end = starts[i + 1];
    for (; q + 4 <= end; q += 4) {
      const FourValues value(values + q);
      const FourOffsets offset(w.offsets + q);
      add_product(value.get<0>(), x_panel, offset.get<0>(), sum);
      add_product(value.get<1>(), x_panel, offset.get<1>(), sum);
      add_product(value.get<2>(), x_panel, offset.get<2>(), sum);
      add_product(value.get<3>(), x_panel, offset.get<3>(), sum);
    }
    for (; q < end; q++) add_product(values[q], x_panel, w.offsets[q], sum);
    RAREFY_UNROLL for (int k = 0; k < NV; k++) total[k] = sum[k];
  }
}

// One tile of tokens, output rows [rows.begin, rows.end). Where one block holds all rows, x is packed panel by panel
// and each panel is used while it is hot; else all of x is packed once.
template <int NV, class Element>
void forward_tile(const ForwardCall& c, const Matrix& weight, int tokens, Range rows, const Element* x, Element* y,
                  float* x_tile, float* y_tile) {
  constexpr int T = NV * kLanes;
  const Layout& w = c.weight;
  const int block = weight.rows ? weight.block : rows_per_block(rows.end - rows.begin, T, 1);
  const bool single = rows.begin + block >= rows.end;
  if (!single) pack<NV>(x, w.columns, tokens, w.columns, x_tile);
  for (int begin = rows.begin; begin < rows.end; begin += block) {
    const Range part{begin, min_of(begin + block, rows.end)};
    for (int p = 0, panels = w.count(); p < panels; p++) {
      const int first = p * w.width;
      if (single) pack<NV>(x + first, w.columns, tokens, min_of(w.width, w.columns - first), x_tile);
      const float* x_panel = single ? x_tile : x_tile + static_cast<size_t>(first) * T;
      if (weight.rows)
        multiply_panel<NV, true>(weight, p, part, x_panel, c.bias, y_tile);
      else
        multiply_panel<NV, false>(weight, p, part, x_panel, c.bias, y_tile);
    }
    unpack<NV>(y_tile, tokens, part.end - part.begin, y + part.begin, w.rows);
  }
}

template <int Most, class Element>
bool forward_tiles(const ForwardCall& c) {
  constexpr int T = Most * kLanes;
  const Layout& w = c.weight;
  const int64_t tiles = (c.tokens + T - 1) / T;
  const int row_parts = tiles >= 4 * c.threads ? 1 : min_of(c.threads, (w.rows + kLanes - 1) / kLanes);
  const int packed = one_block(w.rows, T, 1) ? min_of(w.width, w.columns) : w.columns;
  const size_t x_floats = static_cast<size_t>(packed) * T;
  const size_t per_thread = x_floats + accumulator_floats(w.rows, T, 1);
  const Buffer scratch(per_thread * c.threads * sizeof(float));
  const SortedRows sorted(w, c.values, rows_per_block(w.rows, T, 1), row_parts == 1 && sorting_pays(w, tiles));
  if (!scratch.ok() || !sorted.ok()) return false;
  const Matrix weight = sorted.get();
#pragma omp parallel num_threads(c.threads)
  {
    float* x_tile = scratch.as<float>() + per_thread * omp_get_thread_num();
    float* y_tile = x_tile + x_floats;
#pragma omp for schedule(static)
    for (int64_t id = 0; id < sorted.count(); id++) sorted.sort(id);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tiles * row_parts; task++) {
      const int64_t token = task / row_parts * T;
      const Range rows = part(w, row_parts, static_cast<int>(task % row_parts));
      const int tokens = static_cast<int>(min_of(static_cast<int64_t>(T), c.tokens - token));
      const Element* x = static_cast<const Element*>(c.x) + token * w.columns;
      Element* y = static_cast<Element*>(c.y) + token * w.rows;
      if (rows.begin < rows.end)
        with_vectors<Most>(tokens, [&](auto nv) {
          forward_tile<decltype(nv)::value>(c, weight, tokens, rows, x, y, x_tile, y_tile);
        });
    }
  }
  return true;
}

template <class Element>
bool forward_of(const ForwardCall& c) {
  if (c.tokens <= kFewTokens) return forward_few<Element>(c);
  const bool has_many = c.weight.nonzeros() * 6 > static_cast<int64_t>(c.weight.rows) * c.weight.columns;
  return has_many ? forward_tiles<kLongForwardVectors, Element>(c) : forward_tiles<kForwardVectors, Element>(c);
}

}  // namespace

bool forward(const ForwardCall& c) {
  if (c.tokens <= 0 || c.weight.rows <= 0) return true;
  ForwardCall call = c;
  // A lone token does not fill vectors: a multiply-add takes about twenty times longer.
  const int64_t tokens = c.tokens == 1 ? 20 : max_of(c.tokens, static_cast<int64_t>(kFewTokens));
  call.threads = useful_threads(c.threads, c.weight.nonzeros() * tokens);
  return c.element == Element::kFloat32 ? forward_of<float>(call) : forward_of<Bfloat16>(call);
}

}  // namespace rarefy::RAREFY_ISA
