// y = x · Wᵀ + bias with tiles in float16: twice the products of forward.cpp an instruction.
#include <omp.h>

#include "buffer.h"
#include "half.h"
#include "half_operations.h"
#include "half_weight.h"

namespace rarefy::RAREFY_ISA {
namespace {

template <int NV>
RAREFY_INLINE void add_product(HalfPair pair, const HalfBits* x_panel, size_t offset, Halves (&sum)[NV]) {
  const HalfBits* x = x_panel + offset * (NV * kHalves);
  const Halves value = both(pair);
  RAREFY_UNROLL for (int k = 0; k < NV; k++) sum[k] = _mm512_fmadd_ph(value, load_halves(x + k * kHalves), sum[k]);
}

// sum += the products of connections q to end. Up to four vectors have two sets of sums: a multiply-add takes four
// cycles, and two begin in each.
template <int NV>
RAREFY_INLINE void add_products(const Layout& w, const HalfPair* pairs, const HalfBits* x_panel, int64_t q, int64_t end,
                                Halves (&sum)[NV]) {
  constexpr bool kTwoSets = NV <= 4;
  Halves other[NV];
  if (kTwoSets) {
    RAREFY_UNROLL for (int k = 0; k < NV; k++) other[k] = _mm512_setzero_ph();
  }
  for (; q + 4 <= end; q += 4) {
    const FourOffsets offset(w.offsets + q);
    add_product(pairs[q], x_panel, offset.get<0>(), sum);
    add_product(pairs[q + 1], x_panel, offset.get<1>(), kTwoSets ? other : sum);
    add_product(pairs[q + 2], x_panel, offset.get<2>(), sum);
    add_product(pairs[q + 3], x_panel, offset.get<3>(), kTwoSets ? other : sum);
  }
  for (; q < end; q++) add_product(pairs[q], x_panel, w.offsets[q], sum);
  if (kTwoSets) {
    RAREFY_UNROLL for (int k = 0; k < NV; k++) sum[k] = _mm512_add_ph(sum[k], other[k]);
  }
}

// Scratch of one thread.
struct ForwardTiles {
  HalfBits* x;      // [columns][T], or one panel of it
  HalfBits* sums;   // [block of rows][T]
  float* totals;    // [block of rows][T]; null where one sum holds all
  float* largest;   // [T]
  float* shifts;    // [T]
};

template <int NV>
void multiply_panel(const Layout& w, int panel, Range rows, const Sums& sums, const HalfPair* pairs, const HalfBits* x_panel,
                    const ForwardTiles& tiles) {
  constexpr int T = NV * kHalves;
  const int32_t* starts = w.starts + static_cast<int64_t>(panel) * w.rows;
  const bool begins = sums.begin(panel), is_last = panel + 1 == w.count(), ends = is_last || sums.begin(panel + 1);
  const bool adds = ends && !sums.whole, is_first = panel < sums.panels;
  for (int row = rows.begin; row < rows.end; row++) {
    const size_t at = static_cast<size_t>(row - rows.begin) * T;
    HalfBits* kept = tiles.sums + at;
    Halves sum[NV];
    RAREFY_UNROLL for (int k = 0; k < NV; k++) sum[k] = begins ? _mm512_setzero_ph() : load_halves(kept + k * kHalves);
    int64_t q = starts[row];
    const int64_t end = starts[row + 1];
    bool starts_total = is_first;
    for (; end - q > kMostProducts; q += kMostProducts) {  // only where a sum is one panel
      add_products<NV>(w, pairs, x_panel, q, q + kMostProducts, sum);
      add_to_total(sum, tiles.totals + at, starts_total);
      RAREFY_UNROLL for (int k = 0; k < NV; k++) sum[k] = _mm512_setzero_ph();
      starts_total = false;
    }
    add_products<NV>(w, pairs, x_panel, q, end, sum);
    if (adds) {
      add_to_total(sum, tiles.totals + at, starts_total);
    } else {
      RAREFY_UNROLL for (int k = 0; k < NV; k++) store_halves(kept + k * kHalves, sum[k]);
    }
  }
}

// What all threads share.
struct ForwardPlan {
  const ForwardCall& call;
  Sums sums;
  Buffer pairs;   // [nonzeros]
  Buffer shifts;  // [rows]
  int arrays;     // that blocks of rows are shared by, in units of [T] float16

  explicit ForwardPlan(const ForwardCall& c)
      : call(c), sums(c.weight), pairs(c.weight.nonzeros() * sizeof(HalfPair)), shifts(c.weight.rows * sizeof(float)),
        arrays(sums.whole ? 1 : 3) {}
  bool ok() const { return pairs.ok() && shifts.ok(); }
};

template <int NV, class Element>
bool forward_tile(const ForwardPlan& plan, int64_t token, int tokens, Range rows, const ForwardTiles& tiles) {
  constexpr int T = NV * kHalves;
  const Layout& w = plan.call.weight;
  const Element* x = static_cast<const Element*>(plan.call.x) + token * w.columns;
  Element* y = static_cast<Element*>(plan.call.y) + token * w.rows;
  if (!shift_tokens<T>(x, w.columns, tokens, tiles.largest, tiles.shifts)) return false;
  const int block = rows_per_block(rows.end - rows.begin, T / 2, plan.arrays);
  const bool single = rows.begin + block >= rows.end;
  if (!single) pack<NV>(x, w.columns, tokens, w.columns, tiles.shifts, tiles.x);
  for (int begin = rows.begin; begin < rows.end; begin += block) {
    const Range part{begin, min_of(begin + block, rows.end)};
    for (int p = 0, panels = w.count(); p < panels; p++) {
      const int first = p * w.width;
      if (single) pack<NV>(x + first, w.columns, tokens, min_of(w.width, w.columns - first), tiles.shifts, tiles.x);
      const HalfBits* x_panel = single ? tiles.x : tiles.x + static_cast<size_t>(first) * T;
      multiply_panel<NV>(w, p, part, plan.sums, plan.pairs.as<HalfPair>(), x_panel, tiles);
    }
    const float* bias = plan.call.bias ? plan.call.bias + begin : nullptr;
    const Features features{plan.shifts.as<float>() + begin, bias};
    const int size = part.end - part.begin;
    if (plan.sums.whole)
      unpack<NV>(tiles.sums, tokens, size, tiles.shifts, features, y + begin, w.rows);
    else
      unpack<NV>(tiles.totals, tokens, size, tiles.shifts, features, y + begin, w.rows);
  }
  return true;
}

template <int Most, class Element>
HalfResult forward_tiles(const ForwardCall& c) {
  constexpr int T = Most * kHalves;
  const Layout& w = c.weight;
  const ForwardPlan plan(c);
  const int64_t tiles = (c.tokens + T - 1) / T;
  const int row_parts = tiles >= 4 * c.threads ? 1 : min_of(c.threads, (w.rows + kLanes - 1) / kLanes);
  const int packed = one_block(w.rows, T / 2, plan.arrays) ? min_of(w.width, w.columns) : w.columns;
  const size_t x_size = static_cast<size_t>(packed) * T / 2, sum_size = tile_floats(w.rows, T, plan.arrays);
  const size_t per_thread = x_size + plan.arrays * sum_size + 2 * T;
  const Buffer scratch(per_thread * c.threads * sizeof(float));
  if (!scratch.ok() || !plan.ok()) return HalfResult::kNoMemory;
  bool finite = true;
#pragma omp parallel num_threads(c.threads) reduction(&& : finite)
  {
#pragma omp for schedule(static)
    for (int row = 0; row < w.rows; row++) {
      const float shift = convert_row(w, row, c.values, nullptr, plan.pairs.as<HalfPair>());
      plan.shifts.as<float>()[row] = shift;
      finite = finite && shift == shift;
    }
    float* begin = scratch.as<float>() + per_thread * omp_get_thread_num();
    HalfBits* x_tile = reinterpret_cast<HalfBits*>(begin + 2 * T);
    HalfBits* sums = x_tile + 2 * x_size;
    const ForwardTiles own{x_tile, sums, reinterpret_cast<float*>(sums + 2 * sum_size), begin, begin + T};
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tiles * row_parts; task++) {
      const int64_t token = task / row_parts * T;
      const Range rows = part(w, row_parts, static_cast<int>(task % row_parts));
      const int tokens = static_cast<int>(min_of(static_cast<int64_t>(T), c.tokens - token));
      if (rows.begin < rows.end)
        with_vectors<Most, kHalves>(tokens, [&](auto nv) {
          finite = forward_tile<decltype(nv)::value, Element>(plan, token, tokens, rows, own) && finite;
        });
    }
  }
  return finite ? HalfResult::kDone : HalfResult::kNotFinite;
}

template <class Element>
HalfResult forward_of(const ForwardCall& c) {
  const bool has_many = c.weight.nonzeros() * 6 > static_cast<int64_t>(c.weight.rows) * c.weight.columns;
  return has_many ? forward_tiles<kLongForwardVectors, Element>(c) : forward_tiles<kForwardVectors, Element>(c);
}

}  // namespace

HalfResult half_forward(const ForwardCall& c) {
  if (c.tokens <= 0 || c.weight.rows <= 0) return HalfResult::kDone;
  ForwardCall call = c;
  call.threads = useful_threads(c.threads, c.weight.nonzeros() * c.tokens / 2);
  return c.element == Element::kFloat16 ? forward_of<Float16>(call) : forward_of<Bfloat16>(call);
}

}  // namespace rarefy::RAREFY_ISA
