// The fused backward pass over the rows of Wᵀ: one load of dL/dy feeds both dL/dx and dL/dW at the nonzeros.
#include <omp.h>

#include "backward_grid.h"
#include "buffer.h"
#include "kernels.h"
#include "operations.h"
#include "partition.h"
#include "tile.h"
#include "tile_queue.h"

namespace rarefy::RAREFY_ISA {
namespace {

// Scratch of one thread.
struct Tiles {
  float* grad;    // [columns][T], or one panel of it
  float* x;       // [block of rows][T]
  float* grad_x;  // [block of rows][T]
};

// What one thread works on: rows [rows.begin, rows.end) of Wᵀ and its own sums over its tokens.
struct Share {
  Range rows;
  const float* values;  // in the order of the transposed structure
  float* value_sums;    // same order
  float* bias_sums;     // [columns] or null
};

template <int NV>
void add_column_sums(const float* tile, int columns, float* sums) {
  for (int c = 0; c < columns; c++) {
    const Vec* g = reinterpret_cast<const Vec*>(tile + static_cast<size_t>(c) * NV * kLanes);
    Vec s = g[0];
    RAREFY_UNROLL for (int k = 1; k < NV; k++) s += g[k];
    sums[c] += lane_sum(s);
  }
}

constexpr float kNoValues[4] = {};

// One row of Wᵀ in one panel. The sums over lanes of four connections are taken while the next four are multiplied:
// they wait for long chains of additions, and instructions retire in order (12% of the pass with AVX2).
template <int NV, bool kGradX, bool kGradValues>
struct Row {
  const uint16_t* offsets;
  const float* values;
  const float* grad_panel;
  float* value_sums;
  Vec x[NV], grad_x[NV];
  Vec first_pair, second_pair;  // x · dL/dy of the last four connections, folded

  // dL/dx of this row += value · dL/dy; returns x · dL/dy, still spread over the lanes.
  template <class Value>
  __attribute__((always_inline)) Vec nonzero(Value value, size_t offset) {
    const Vec* grad = reinterpret_cast<const Vec*>(grad_panel + offset * (NV * kLanes));
    Vec product{};
    RAREFY_UNROLL for (int k = 0; k < NV; k++) {
      Vec g = grad[k];
#if defined(__AVX512F__)
      // Once, into a register: GCC lets both multiply-adds load it, and Intel's processors run out of loads (15%).
      __asm__("" : "+v"(g));
#endif
      if (kGradX) grad_x[k] += value * g;
      if (kGradValues) product = k == 0 ? x[0] * g : product + x[k] * g;
    }
    return product;
  }

  __attribute__((always_inline)) void add_sums(int64_t q, Vec folded) {
    *reinterpret_cast<UnalignedVec4*>(value_sums + q) += lane_sums(folded);
  }

  // Connections q to q + 3, and the sums of the four before them.
  template <bool kSums>
  __attribute__((always_inline)) void four(int64_t q) {
    const FourValues value(kGradX ? values + q : kNoValues);
    const FourOffsets offset(offsets + q);
    Vec folded{};
    const Vec a = nonzero(value.template get<0>(), offset.get<0>());
    if (kSums) folded = fold_pairs(first_pair, second_pair);
    const Vec b = nonzero(value.template get<1>(), offset.get<1>());
    if (kSums) add_sums(q - 4, folded);
    const Vec c = nonzero(value.template get<2>(), offset.get<2>());
    if (kGradValues) first_pair = fold(a, b);
    const Vec d = nonzero(value.template get<3>(), offset.get<3>());
    if (kGradValues) second_pair = fold(c, d);
  }

  __attribute__((always_inline)) void run(int64_t q, int64_t end) {
    if (q + 4 <= end) {
      four<false>(q);
      for (q += 4; q + 4 <= end; q += 4) four<kGradValues>(q);
      if (kGradValues) add_sums(q - 4, fold_pairs(first_pair, second_pair));
    }
    for (; q < end; q++) {
      const Vec a = nonzero(kGradX ? values[q] : 0.f, offsets[q]);
      if (kGradValues) value_sums[q] += lane_sum(a);
    }
  }
};

template <int NV, bool kGradX, bool kGradValues>
void backward_panel(const Layout& t, int panel, Range rows, const Share& share, const float* grad_panel,
                    const Tiles& tiles) {
  const int32_t* starts = t.starts + static_cast<int64_t>(panel) * t.rows;
  Row<NV, kGradX, kGradValues> r{t.offsets, share.values, grad_panel, share.value_sums, {}, {}, {}, {}};
  for (int row = rows.begin; row < rows.end; row++) {
    const size_t at = static_cast<size_t>(row - rows.begin) * NV * kLanes;
    Vec* grad_x = reinterpret_cast<Vec*>(tiles.grad_x + at);
    RAREFY_UNROLL for (int k = 0; k < NV; k++) {
      if (kGradValues) r.x[k] = reinterpret_cast<const Vec*>(tiles.x + at)[k];
      if (kGradX) r.grad_x[k] = panel == 0 ? Vec{} : grad_x[k];
    }
    r.run(starts[row], starts[row + 1]);
    if (kGradX) {
      RAREFY_UNROLL for (int k = 0; k < NV; k++) grad_x[k] = r.grad_x[k];
    }
  }
}

// One tile of tokens. As in the forward pass, a single block of rows lets each panel be packed just before its use.
template <int NV, bool kGradX, bool kGradValues, class Element>
void backward_tile(const BackwardCall& c, int64_t token, int tokens, const Share& share, const Tiles& tiles) {
  const Layout& t = c.transposed;
  const Element* grad = static_cast<const Element*>(c.grad) + token * t.columns;
  const Range rows = share.rows;
  const int block = rows_per_block(rows.end - rows.begin, NV * kLanes, 2);
  const bool single = rows.begin + block >= rows.end;
  const auto pack_grad = [&](int first, int columns) {
    pack<NV>(grad + first, t.columns, tokens, columns, tiles.grad);
    if (share.bias_sums) add_column_sums<NV>(tiles.grad, columns, share.bias_sums + first);
  };
  if (!single) pack_grad(0, t.columns);
  for (int begin = rows.begin; begin < rows.end; begin += block) {
    const Range part{begin, min_of(begin + block, rows.end)};
    const int size = part.end - part.begin;
    if (kGradValues) pack<NV>(static_cast<const Element*>(c.x) + token * t.rows + begin, t.rows, tokens, size, tiles.x);
    for (int p = 0, panels = t.count(); p < panels; p++) {
      const int first = p * t.width;
      if (single) pack_grad(first, min_of(t.width, t.columns - first));
      const float* grad_panel = single ? tiles.grad : tiles.grad + static_cast<size_t>(first) * NV * kLanes;
      backward_panel<NV, kGradX, kGradValues>(t, p, part, share, grad_panel, tiles);
    }
    if (kGradX) unpack<NV>(tiles.grad_x, tokens, size, static_cast<Element*>(c.grad_x) + token * t.rows + begin, t.rows);
  }
}

// Memory of one call.
struct Workspace {
  int64_t nonzeros, columns;
  Grid grid;
  Buffer values, value_sums, bias_sums, tiles;
  size_t grad_floats, row_floats;

  Workspace(const BackwardCall& c, Grid g, size_t grad_size, size_t row_size)
      : nonzeros(c.transposed.nonzeros()), columns(c.transposed.columns), grid(g),
        values(c.grad_x ? nonzeros * 4 : 0), value_sums(c.grad_values ? nonzeros * 4 * g.token_groups : 0),
        bias_sums(c.grad_bias ? columns * 4 * g.token_groups : 0),
        tiles((grad_size + 2 * row_size) * 4 * c.threads), grad_floats(grad_size), row_floats(row_size) {}

  bool ok() const { return values.ok() && value_sums.ok() && bias_sums.ok() && tiles.ok(); }
  Tiles tiles_of(int thread) const {
    float* begin = tiles.as<float>() + (grad_floats + 2 * row_floats) * thread;
    return {begin, begin + grad_floats, begin + grad_floats + row_floats};
  }
};

template <int Most, class Element>
void run_tile(const BackwardCall& c, int64_t token, const Share& share, const Tiles& tiles) {
  constexpr int T = Most * kLanes;
  const int tokens = static_cast<int>(min_of(static_cast<int64_t>(T), c.tokens - token));
  with_vectors<Most>(tokens, [&](auto nv) {
    constexpr int NV = decltype(nv)::value;
    if (c.grad_x && c.grad_values)
      backward_tile<NV, true, true, Element>(c, token, tokens, share, tiles);
    else if (c.grad_x)
      backward_tile<NV, true, false, Element>(c, token, tokens, share, tiles);
    else if (c.grad_values)
      backward_tile<NV, false, true, Element>(c, token, tokens, share, tiles);
    else
      backward_tile<NV, false, false, Element>(c, token, tokens, share, tiles);
  });
}

// Share `id` of the grid.
Share share_of(const BackwardCall& c, const Workspace& w, int id) {
  const int group = id / w.grid.row_groups;
  Share share{part(c.transposed, w.grid.row_groups, id % w.grid.row_groups), w.values.as<float>(), nullptr, nullptr};
  if (c.grad_values) share.value_sums = w.value_sums.as<float>() + w.nonzeros * group;
  // Every group of rows reads all of dL/dy: the first one adds it up for all.
  const bool is_first = share.rows.begin == 0 && share.rows.end > 0;
  if (c.grad_bias && is_first) share.bias_sums = w.bias_sums.as<float>() + w.columns * group;
  return share;
}

void clear_sums(const Layout& t, const Share& share) {
  for (int p = 0, panels = t.count(); share.value_sums && p < panels; p++) {
    const int32_t* starts = t.starts + static_cast<int64_t>(p) * t.rows;
    const int32_t begin = starts[share.rows.begin], end = starts[share.rows.end];
    memset(share.value_sums + begin, 0, static_cast<size_t>(end - begin) * 4);
  }
  if (share.bias_sums) memset(share.bias_sums, 0, static_cast<size_t>(t.columns) * 4);
}

template <int Most, class Element>
bool backward_tiles(const BackwardCall& c) {
  constexpr int T = Most * kLanes;
  const Layout& t = c.transposed;
  const int64_t tiles_total = (c.tokens + T - 1) / T;
  Grid grid = make_grid(c, tiles_total, t.nonzeros());
  if (spare_group_pays(c.threads, grid.token_groups, tiles_total, t.nonzeros())) grid.token_groups++;
  const auto first_tile = [&](int group) { return share_begin(tiles_total, grid.token_groups, group); };
  const int packed = one_block(t.rows, T, 2) ? min_of(t.width, t.columns) : t.columns;
  const Workspace w(c, grid, static_cast<size_t>(packed) * T, accumulator_floats(t.rows, T, 2));
  const int shares = grid.token_groups * grid.row_groups;
  TileQueue queue(shares, [&](int id) { return first_tile(id / grid.row_groups + 1) - first_tile(id / grid.row_groups); });
  if (!w.ok() || !queue.ok()) return false;
#pragma omp parallel num_threads(c.threads)
  {
    if (c.grad_x) {
      // Gathered once, so that every tile of tokens reads the values in order.
#pragma omp for schedule(static)
      for (int64_t q = 0; q < w.nonzeros; q++) w.values.as<float>()[q] = c.values[c.order[q]];
    }
    const Tiles tiles = w.tiles_of(omp_get_thread_num());
#pragma omp for schedule(static, 1)
    for (int id = 0; id < shares; id++) clear_sums(t, share_of(c, w, id));
    for (TileQueue::Turn turn; queue.next(turn);) {
      const int64_t tile = first_tile(turn.line / grid.row_groups) + turn.tile;
      run_tile<Most, Element>(c, tile * T, share_of(c, w, turn.line), tiles);
    }
#pragma omp barrier
    if (c.grad_values) reduce(w.value_sums.as<float>(), w.nonzeros, grid.token_groups, c.order, c.grad_values);
    if (c.grad_bias) reduce(w.bias_sums.as<float>(), w.columns, grid.token_groups, nullptr, c.grad_bias);
  }
  return true;
}

template <class Element>
bool backward_of(const BackwardCall& c) {
  const Layout& t = c.transposed;
  const bool has_tiles = c.tokens >= int64_t{2} * kLongBackwardVectors * kLanes * c.threads;
  if (!on_intel() || !has_tiles) return backward_tiles<kBackwardVectors, Element>(c);
  // Below a twelfth the panels are so wide that the longest tiles outgrow the cache.
  const bool has_many = t.nonzeros() * 12 > static_cast<int64_t>(t.rows) * t.columns;
  return has_many ? backward_tiles<kLongBackwardVectors, Element>(c) : backward_tiles<kMiddleBackwardVectors, Element>(c);
}

}  // namespace

bool backward(const BackwardCall& c) {
  if (c.transposed.rows <= 0) return true;
  BackwardCall call = c;
  const int64_t tokens = max_of(c.tokens, int64_t{kLanes});  // fewer take as long as a vector of them
  call.threads = useful_threads(c.threads, c.transposed.nonzeros() * tokens);
  return c.element == Element::kFloat32 ? backward_of<float>(call) : backward_of<Bfloat16>(call);
}

}  // namespace rarefy::RAREFY_ISA
