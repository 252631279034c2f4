// The fused backward pass over the rows of Wᵀ with tiles in float16: twice the products of backward.cpp an instruction.
#include <omp.h>

#include "backward_grid.h"
#include "buffer.h"
#include "half.h"
#include "half_operations.h"
#include "half_row.h"
#include "half_weight.h"

namespace rarefy::RAREFY_ISA {
namespace {

// Scratch of one thread.
struct BackwardTiles {
  HalfBits* grad;    // [columns][T], or one panel of it
  HalfBits* x;       // [block of rows][T]
  HalfBits* grad_x;  // [block of rows][T]
  float* totals;     // [block of rows][T]; only where one sum does not hold all
  float* grad_largest;  // these four [T]
  float* grad_shifts;
  float* x_largest;
  float* x_shifts;
};

// What all threads share.
struct BackwardPlan {
  const BackwardCall& call;
  Sums sums;
  Grid grid;
  int64_t nonzeros;
  Buffer pairs, shifts, value_sums, bias_sums;
  int arrays;  // that blocks of rows are shared by, in units of [T] float16

  BackwardPlan(const BackwardCall& c, Grid g)
      : call(c), sums(c.transposed), grid(g), nonzeros(c.transposed.nonzeros()),
        pairs(c.grad_x ? nonzeros * sizeof(HalfPair) : 0), shifts(c.transposed.rows * sizeof(float)),
        value_sums(c.grad_values ? nonzeros * 4 * g.token_groups : 0),
        bias_sums(c.grad_bias ? c.transposed.columns * 4 * static_cast<int64_t>(g.token_groups) : 0),
        arrays(sums.whole ? 2 : 4) {}
  bool ok() const { return pairs.ok() && shifts.ok() && value_sums.ok() && bias_sums.ok(); }
};

// Rows of Wᵀ and the sums over the tokens that one share of the grid has.
struct HalfShare {
  Range rows;
  float* value_sums;
  float* bias_sums;  // or null
};

template <class Element>
void add_column_sums(const Element* source, int64_t stride, int tokens, int columns, float* sums) {
  constexpr int kWide = 4 * kLanes;
  int c = 0;
  for (; c + kWide <= columns; c += kWide) {
    Vec s[4];
    RAREFY_UNROLL for (int k = 0; k < 4; k++) s[k] = load(sums + c + k * kLanes);
    for (int t = 0; t < tokens; t++)
      RAREFY_UNROLL for (int k = 0; k < 4; k++) s[k] += (Vec)widened(words_of(source + t * stride + c + k * kLanes), Element{});
    RAREFY_UNROLL for (int k = 0; k < 4; k++) store(sums + c + k * kLanes, s[k]);
  }
  for (; c < columns; c++)
    for (int t = 0; t < tokens; t++)
      sums[c] += _mm512_cvtss_f32(widened(_mm512_set1_epi32(source[t * stride + c].bits), Element{}));
}

// x is packed so that x · dL/dy has one scale for all tokens of a tile, though dL/dy has one for each. Returns the power
// of two of that scale: the largest product lies below 2^7, so that sums over a tile's tokens stay below 2^15.
template <int T>
float shift_products(const BackwardTiles& tiles) {
  const __m512 infinite = _mm512_set1_ps(__builtin_inff());
  __m512 room = infinite;
  for (int t = 0; t < T; t += kLanes) {
    const __m512 x = _mm512_load_ps(tiles.x_largest + t), g = _mm512_load_ps(tiles.grad_largest + t);
    const __m512 of_token = _mm512_add_ps(_mm512_sub_ps(_mm512_set1_ps(kTopExponent - 1), _mm512_getexp_ps(x)),
                                          _mm512_load_ps(tiles.grad_shifts + t));
    const __mmask16 counts = _mm512_test_epi32_mask(_mm512_castps_si512(x), _mm512_castps_si512(x)) &
                             _mm512_test_epi32_mask(_mm512_castps_si512(g), _mm512_castps_si512(g));
    room = _mm512_mask_min_ps(room, counts, room, of_token);
  }
  const float least = _mm512_reduce_min_ps(room);
  const float shift = least == __builtin_inff() ? 0 : least;
  for (int t = 0; t < T; t += kLanes) {
    const __m512i g = _mm512_castps_si512(_mm512_load_ps(tiles.grad_largest + t));
    const __m512 of_token = _mm512_sub_ps(_mm512_set1_ps(shift), _mm512_load_ps(tiles.grad_shifts + t));
    // Tokens without a gradient become 0: scaled as the others are, they might overflow.
    _mm512_store_ps(tiles.x_shifts + t, _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), _mm512_test_epi32_mask(g, g), of_token));
  }
  return shift;
}

template <int NV, bool kGradX, bool kGradValues>
void backward_panel(const BackwardPlan& plan, int panel, Range rows, const HalfShare& share, const HalfBits* grad_panel,
                    const BackwardTiles& tiles, float shift) {
  constexpr int T = NV * kHalves;
  const Layout& t = plan.call.transposed;
  const Sums& sums = plan.sums;
  const int32_t* starts = t.starts + static_cast<int64_t>(panel) * t.rows;
  const bool begins = sums.begin(panel), ends = panel + 1 == t.count() || sums.begin(panel + 1);
  const bool adds = ends && !sums.whole, is_first = panel < sums.panels;
  HalfRow<NV, kGradX, kGradValues> r;
  r.offsets = t.offsets;
  r.pairs = plan.pairs.as<HalfPair>();
  r.grad_panel = grad_panel;
  r.value_sums = share.value_sums;
  r.power = _mm_set1_ps(-shift);
  r.first_pair = r.second_pair = Vec{};
  for (int row = rows.begin; row < rows.end; row++) {
    const size_t at = static_cast<size_t>(row - rows.begin) * T;
    HalfBits* kept = tiles.grad_x + at;
    RAREFY_UNROLL for (int k = 0; k < NV; k++) {
      if (kGradValues) r.x[k] = load_halves(tiles.x + at + k * kHalves);
      if (kGradX) r.grad_x[k] = begins ? _mm512_setzero_ph() : load_halves(kept + k * kHalves);
    }
    int64_t q = starts[row];
    const int64_t end = starts[row + 1];
    bool starts_total = is_first;
    for (; kGradX && end - q > kMostProducts; q += kMostProducts) {  // only where a sum is one panel
      r.run(q, q + kMostProducts);
      add_to_total(r.grad_x, tiles.totals + at, starts_total);
      RAREFY_UNROLL for (int k = 0; k < NV; k++) r.grad_x[k] = _mm512_setzero_ph();
      starts_total = false;
    }
    r.run(q, end);
    if (kGradX && adds) {
      add_to_total(r.grad_x, tiles.totals + at, starts_total);
    } else if (kGradX) {
      RAREFY_UNROLL for (int k = 0; k < NV; k++) store_halves(kept + k * kHalves, r.grad_x[k]);
    }
  }
}

template <int NV, bool kGradX, bool kGradValues, class Element>
bool backward_tile(const BackwardPlan& plan, int64_t token, int tokens, const HalfShare& share, const BackwardTiles& tiles) {
  constexpr int T = NV * kHalves;
  const Layout& t = plan.call.transposed;
  const Element* grad = static_cast<const Element*>(plan.call.grad) + token * t.columns;
  const Element* x = static_cast<const Element*>(plan.call.x) + token * t.rows;
  if (!shift_tokens<T>(grad, t.columns, tokens, tiles.grad_largest, tiles.grad_shifts)) return false;
  if (share.bias_sums) add_column_sums(grad, t.columns, tokens, t.columns, share.bias_sums);
  float shift = 0;
  if (kGradValues) {
    if (!shift_tokens<T>(x, t.rows, tokens, tiles.x_largest, tiles.x_shifts)) return false;
    shift = shift_products<T>(tiles);
  }
  const Range rows = share.rows;
  const int block = rows_per_block(rows.end - rows.begin, T / 2, plan.arrays);
  const bool single = rows.begin + block >= rows.end;
  const auto pack_grad = [&](int first, int columns) {
    pack<NV>(grad + first, t.columns, tokens, columns, tiles.grad_shifts, tiles.grad);
  };
  if (!single) pack_grad(0, t.columns);
  for (int begin = rows.begin; begin < rows.end; begin += block) {
    const Range part{begin, min_of(begin + block, rows.end)};
    const int size = part.end - part.begin;
    if (kGradValues) pack<NV>(x + begin, t.rows, tokens, size, tiles.x_shifts, tiles.x);
    for (int p = 0, panels = t.count(); p < panels; p++) {
      const int first = p * t.width;
      if (single) pack_grad(first, min_of(t.width, t.columns - first));
      const HalfBits* grad_panel = single ? tiles.grad : tiles.grad + static_cast<size_t>(first) * T;
      backward_panel<NV, kGradX, kGradValues>(plan, p, part, share, grad_panel, tiles, shift);
    }
    if (!kGradX) continue;
    const Features features{plan.shifts.as<float>() + begin, nullptr};
    Element* target = static_cast<Element*>(plan.call.grad_x) + token * t.rows + begin;
    if (plan.sums.whole)
      unpack<NV>(tiles.grad_x, tokens, size, tiles.grad_shifts, features, target, t.rows);
    else
      unpack<NV>(tiles.totals, tokens, size, tiles.grad_shifts, features, target, t.rows);
  }
  return true;
}

template <int Most, class Element>
bool run_tile(const BackwardPlan& plan, int64_t token, const HalfShare& share, const BackwardTiles& tiles) {
  constexpr int T = Most * kHalves;
  const BackwardCall& c = plan.call;
  const int tokens = static_cast<int>(min_of(static_cast<int64_t>(T), c.tokens - token));
  bool finite = true;
  with_vectors<Most, kHalves>(tokens, [&](auto nv) {
    constexpr int NV = decltype(nv)::value;
    if (c.grad_x && c.grad_values)
      finite = backward_tile<NV, true, true, Element>(plan, token, tokens, share, tiles);
    else if (c.grad_x)
      finite = backward_tile<NV, true, false, Element>(plan, token, tokens, share, tiles);
    else
      finite = backward_tile<NV, false, true, Element>(plan, token, tokens, share, tiles);
  });
  return finite;
}

// Share `id` of the grid: zero its sums, then go through its tiles of tokens in order.
template <int Most, class Element>
bool run_share(const BackwardPlan& plan, int id, const BackwardTiles& tiles) {
  constexpr int T = Most * kHalves;
  const BackwardCall& c = plan.call;
  const Layout& t = c.transposed;
  const int group = id / plan.grid.row_groups, row_group = id % plan.grid.row_groups;
  HalfShare share{part(t, plan.grid.row_groups, row_group), nullptr, nullptr};
  if (c.grad_values) {
    share.value_sums = plan.value_sums.as<float>() + plan.nonzeros * group;
    each_panel_range(t, share.rows, [&](int64_t begin, int64_t end) {
      memset(share.value_sums + begin, 0, static_cast<size_t>(end - begin) * 4);
    });
  }
  if (share.rows.begin == share.rows.end) return true;
  // Every group of rows reads all of dL/dy: the first one adds it up for all.
  if (c.grad_bias && share.rows.begin == 0) {
    share.bias_sums = plan.bias_sums.as<float>() + static_cast<int64_t>(t.columns) * group;
    memset(share.bias_sums, 0, static_cast<size_t>(t.columns) * 4);
  }
  bool finite = true;
  const int64_t tiles_total = (c.tokens + T - 1) / T;
  const int64_t end = share_begin(tiles_total, plan.grid.token_groups, group + 1);
  for (int64_t tile = share_begin(tiles_total, plan.grid.token_groups, group); tile < end && finite; tile++)
    finite = run_tile<Most, Element>(plan, tile * T, share, tiles);
  return finite;
}

template <int Most, class Element>
HalfResult backward_tiles(const BackwardCall& c) {
  constexpr int T = Most * kHalves;
  const Layout& t = c.transposed;
  const BackwardPlan plan(c, make_grid(c, (c.tokens + T - 1) / T, t.nonzeros()));
  const int packed = one_block(t.rows, T / 2, plan.arrays) ? min_of(t.width, t.columns) : t.columns;
  const size_t grad_size = static_cast<size_t>(packed) * T / 2, row_size = tile_floats(t.rows, T, plan.arrays);
  const size_t per_thread = grad_size + plan.arrays * row_size + 4 * T;
  const Buffer scratch(per_thread * c.threads * sizeof(float));
  if (!scratch.ok() || !plan.ok()) return HalfResult::kNoMemory;
  bool finite = true;
#pragma omp parallel num_threads(c.threads) reduction(&& : finite)
  {
    if (c.grad_x) {
#pragma omp for schedule(static)
      for (int row = 0; row < t.rows; row++) {
        const float shift = convert_row(t, row, c.values, c.order, plan.pairs.as<HalfPair>());
        plan.shifts.as<float>()[row] = shift;
        finite = finite && shift == shift;
      }
    }
    float* begin = scratch.as<float>() + per_thread * omp_get_thread_num();
    float* grad = begin + 4 * T;
    float* x = grad + grad_size;
    float* grad_x = x + row_size;
    const BackwardTiles own{reinterpret_cast<HalfBits*>(grad), reinterpret_cast<HalfBits*>(x), reinterpret_cast<HalfBits*>(grad_x),
                            grad_x + row_size, begin, begin + T, begin + 2 * T, begin + 3 * T};
    const int shares = plan.grid.token_groups * plan.grid.row_groups;
#pragma omp for schedule(static, 1)
    for (int id = 0; id < shares; id++) finite = run_share<Most, Element>(plan, id, own) && finite;
    if (c.grad_values) reduce(plan.value_sums.as<float>(), plan.nonzeros, plan.grid.token_groups, c.order, c.grad_values);
    if (c.grad_bias) reduce(plan.bias_sums.as<float>(), t.columns, plan.grid.token_groups, nullptr, c.grad_bias);
  }
  return finite ? HalfResult::kDone : HalfResult::kNotFinite;
}

template <class Element>
HalfResult backward_of(const BackwardCall& c) {
  const Layout& t = c.transposed;
  const bool has_many = t.nonzeros() * 12 > static_cast<int64_t>(t.rows) * t.columns;
  const bool has_tiles = c.tokens >= int64_t{2} * kLongBackwardVectors * kHalves * c.threads;
  return has_many && has_tiles ? backward_tiles<kLongBackwardVectors, Element>(c)
                               : backward_tiles<kBackwardVectors, Element>(c);
}

}  // namespace

HalfResult half_backward(const BackwardCall& c) {
  if (c.transposed.rows <= 0) return HalfResult::kDone;
  BackwardCall call = c;
  call.threads = useful_threads(c.threads, c.transposed.nonzeros() * c.tokens / 2);
  return c.element == Element::kFloat16 ? backward_of<Float16>(call) : backward_of<Bfloat16>(call);
}

extern const HalfTable half_table;
const HalfTable half_table{.forward = half_forward, .backward = half_backward};

}  // namespace rarefy::RAREFY_ISA
