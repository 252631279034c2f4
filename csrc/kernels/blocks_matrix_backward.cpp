// Gradients of y = x · Wᵀ + bias for a W of blocks and bfloat16, with the matrix unit.
#include "blocks_backward.h"
#include "blocks_matrix_gradient.h"
#include "blocks_pairs_operations.h"

namespace rarefy::RAREFY_ISA {
namespace {

// Bytes of dL/dy that are multiplied with all of x before the rest: they are read for every block column.
constexpr int64_t kGroupBytes = int64_t{1} << 20;

// Uses of each column of dL/dy from which on its rows are copied: more than in a forward pass, since panels want the cache too.
constexpr int64_t kOften = 512;

// Tokens of a chunk: the more weights, the longer it takes to read and write the sums of dL/dW every time; the fewer, the more
// it matters that panels of dL/dy and x stay in the second-level cache.
int most_tokens(const BlocksBackwardCall& c) {
  const int64_t weight = values_a_feature(c);
  if (weight <= 64) return 3 * kTokenStep;
  return weight <= 128 ? 4 * kTokenStep : 8 * kTokenStep;
}

// What one thread works on: block columns [lines.begin, lines.end) and tokens [token, end).
struct MatrixShare {
  Range lines;
  int64_t token;
  int64_t end;
  float* values;   // sums of dL/dW, in the order of W
  float* bias;     // sums of dL/db, or null
  float* grad;     // panels of dL/dy
  float* x;        // panels of x
  Bfloat16* copy;  // rows of dL/dy
};

// Memory of one call.
struct MatrixWorkspace {
  const BlocksBackwardCall& call;
  BackwardGrid grid;
  Turns turns;
  size_t grad_cells;  // a thread
  size_t x_cells;
  size_t copy_cells;
  Buffer weights;
  Buffer value_sums;
  Buffer bias_sums;
  Buffer panels;

  MatrixWorkspace(const BlocksBackwardCall& c, BackwardGrid g, int chunk)
      : call(c), grid(g), turns(values(), c.shape.rows, g.line_groups, kOften),
        grad_cells(c.grad_values || c.grad_bias ? static_cast<size_t>(chunk) * c.shape.rows / 2 : 0),
        x_cells(c.grad_values ? static_cast<size_t>(chunk) * c.shape.columns / 2 : 0),
        copy_cells(static_cast<size_t>(turns.copied()) * c.shape.rows / 2),
        weights(c.grad_x ? values() / 2 * sizeof(float) : 0),
        value_sums(c.grad_values ? values() * (g.token_groups - 1) * sizeof(float) : 0),
        bias_sums(c.grad_bias ? static_cast<size_t>(c.shape.rows) * (g.token_groups - 1) * sizeof(float) : 0),
        panels(thread_cells() * c.threads * sizeof(float)) {}

  int64_t values() const { return call.blocks() * call.shape.size(); }
  size_t thread_cells() const { return grad_cells + x_cells + copy_cells; }
  bool ok() const { return weights.ok() && value_sums.ok() && bias_sums.ok() && panels.ok(); }

  // Whole steps of tokens for all but the last group.
  int64_t group_begin(int group) const {
    if (group == grid.token_groups) return call.tokens;
    return share_begin(call.tokens / kTokenStep, grid.token_groups, group) * kTokenStep;
  }

  MatrixShare share(int id, int thread) const {
    const int group = id / grid.line_groups, part = id % grid.line_groups;
    const int64_t rows = call.shape.rows;
    float* mine = panels.as<float>() + thread_cells() * thread;
    float* bias = group ? bias_sums.as<float>() + rows * (group - 1) : call.grad_bias;
    return {
        .lines = line_range(call.by_column, grid.line_groups, part),
        .token = group_begin(group),
        .end = group_begin(group + 1),
        .values = group ? value_sums.as<float>() + values() * (group - 1) : call.grad_values,
        .bias = call.grad_bias && part == 0 ? bias : nullptr,
        .grad = mine,
        .x = mine + grad_cells,
        .copy = reinterpret_cast<Bfloat16*>(mine + grad_cells + x_cells),
    };
  }
};

// First block of a line, from `begin` on, whose block row is not above `row`.
RAREFY_INLINE int32_t first_at(const BlockLines& lines, int32_t begin, int32_t end, int row) {
  while (begin < end) {
    const int32_t middle = begin + (end - begin) / 2;
    if (lines.indices[middle] < row)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// kUnit cells of outputs in a tile of weights.
template <int kUnit>
struct MatrixBackward {
  const BlocksBackwardCall& call;
  Turns turns;
  const float* weights;  // cells, in the order of by_column

  // A chunk of tokens; where it is the `first` of its share, sums start from zero.
  struct Chunk {
    int64_t token;
    int tokens;
    int room;
    bool first;
  };

  // dL/dx of the tokens [token, token + tokens).
  void multiply(const MatrixShare& share, int64_t token, int tokens) const {
    const BlockShape& s = call.shape;
    const RowProduct product{
        .weights = {.lines = call.by_column, .depth = s.height, .width = s.width, .cells = weights},
        .rows = turns.take<kUnit>(static_cast<const Bfloat16*>(call.grad) + token * s.rows, s.rows, tokens, share.copy),
        .bias = nullptr,
        .out = static_cast<Bfloat16*>(call.grad_x) + token * s.columns,
        .stride = s.columns,
        .is_streamed = is_streamed(call.grad_x, s.columns, call.tokens),
        .ahead = RowsAhead::of(call.grad, s.rows, token + tokens, share.end, turns.tokens),
    };
    product.template run<kUnit>(share.lines);
  }

  // The tokens [begin, end) of a chunk as panels: dL/dy, and with it dL/db.
  void pack_grad(const MatrixShare& share, const Chunk& chunk, int begin, int end) const {
    const int64_t rows = call.shape.rows;
    const Bfloat16* grad = static_cast<const Bfloat16*>(call.grad) + chunk.token * rows;
    for (int t = begin; t < end; t += kTokenStep)
      pack_pairs<true>(grad + t * rows, rows, chunk.tokens - t, call.shape.rows, {share.grad, chunk.room}, t, share.bias);
  }

  // The same: x.
  void pack_x(const MatrixShare& share, const Chunk& chunk, int begin, int end) const {
    const BlockShape& s = call.shape;
    const int64_t column = static_cast<int64_t>(share.lines.begin) * s.width;
    const int columns = (share.lines.end - share.lines.begin) * s.width;
    const Bfloat16* x = static_cast<const Bfloat16*>(call.x) + chunk.token * s.columns + column;
    for (int t = begin; t < end; t += kTokenStep)
      pack_pairs<false>(x + static_cast<int64_t>(t) * s.columns, s.columns, chunk.tokens - t, columns, {share.x, chunk.room}, t,
                        nullptr);
  }

  // dL/dy and x as panels, and dL/dx from the rows of dL/dy that are near then. Panels of x would push out many weights, and
  // wait until all of the chunk is multiplied.
  void read(const MatrixShare& share, const Chunk& chunk) const {
    constexpr int64_t few = int64_t{128} << 10;
    const bool waits = call.blocks() * call.shape.size() > few;
    configure_tiles(kUnit);
    for (int begin = 0; begin < chunk.tokens; begin += turns.tokens) {
      const int end = min_of(chunk.tokens, begin + turns.tokens);
      if (call.grad_values || share.bias) pack_grad(share, chunk, begin, end);
      if (call.grad_x) multiply(share, chunk.token + begin, end - begin);
      if (call.grad_values && !waits) pack_x(share, chunk, begin, end);
    }
    if (call.grad_values && waits) pack_x(share, chunk, 0, chunk.tokens);
  }

  // dL/dW of the blocks [begin, end) of one line, from their column `column` on.
  void add_line(const MatrixShare& share, const Chunk& chunk, int line, int32_t begin, int32_t end, int column) const {
    const BlockShape& s = call.shape;
    const PairPanels grad{share.grad, chunk.room}, x{share.x, chunk.room};
    const bool is_wide = column + 2 * kStrip <= s.width;
    const int per_block = s.height / kStrip, strips = (end - begin) * per_block, at_once = is_wide ? 2 : 4;
    const int64_t below = static_cast<int64_t>(kStrip) * s.width;
    StripGradients g{};
    g.x = x.square(((line - share.lines.begin) * s.width + column) / kStrip, 0);
    g.panel = x.panel();
    g.bytes = static_cast<int64_t>(s.width) * sizeof(float);
    g.first = chunk.first;
    for (int strip = 0; strip < strips; strip += at_once) {
      const int count = min_of(at_once, strips - strip);
      for (int i = 0; i < at_once; i++) {
        const int now = min_of(strip + i, strips - 1), next = min_of(strip + at_once + i, strips - 1);
        const int32_t q = begin + now / per_block, next_q = begin + next / per_block;
        g.grad[i] = grad.square(call.by_column.indices[q] * per_block + now % per_block, 0);
        g.sums[i] = share.values + call.order[q] * s.size() + now % per_block * below + column;
        g.next[i] = share.values + call.order[next_q] * s.size() + next % per_block * below + column;
      }
      add_gradients(g, count, is_wide);
    }
  }

  // dL/dW of the active blocks, a group of block rows after the other.
  void add_values(const MatrixShare& share, const Chunk& chunk) const {
    const BlockShape& s = call.shape;
    const int rows = s.rows / s.height;
    const int64_t bytes = static_cast<int64_t>(chunk.room) * s.height * sizeof(Bfloat16);
    const int at_once = static_cast<int>(max_of(int64_t{1}, kGroupBytes / bytes));
    configure_tiles(16);
    for (int row = 0; row < rows; row += at_once)
      for (int line = share.lines.begin; line < share.lines.end; line++) {
        const int32_t last = call.by_column.starts[line + 1];
        const int32_t begin = first_at(call.by_column, call.by_column.starts[line], last, row);
        const int32_t end = first_at(call.by_column, begin, last, row + at_once);
        for (int column = 0; column < s.width; column += 2 * kStrip) add_line(share, chunk, line, begin, end, column);
      }
  }

  void run_share(const MatrixShare& share, int most_tokens) const {
    if (share.bias) memset(share.bias, 0, static_cast<size_t>(call.shape.rows) * sizeof(float));
    for (int64_t token = share.token; token < share.end; token += most_tokens) {
      const int tokens = static_cast<int>(min_of(static_cast<int64_t>(most_tokens), share.end - token));
      const Chunk chunk{
          .token = token,
          .tokens = tokens,
          .room = round_up_to(tokens, kTokenStep),
          .first = token == share.token,
      };
      read(share, chunk);
      if (call.grad_values) add_values(share, chunk);
    }
  }
};

template <int kUnit>
bool backward_with(const BlocksBackwardCall& c) {
  const BackwardGrid grid = backward_grid(c, kTokenStep);
  const int chunk = chunk_tokens(c.tokens, most_tokens(c), kTokenStep, grid.token_groups);
  const MatrixWorkspace w(c, grid, chunk);
  if (!w.ok()) return false;
  const int64_t size = c.shape.size();
  float* weights = w.weights.as<float>();
  const MatrixBackward<kUnit> pass{c, w.turns, weights};
#pragma omp parallel num_threads(c.threads)
  {
    if (c.grad_x) {
#pragma omp for schedule(static)
      for (int64_t b = 0; b < c.blocks(); b++)
        pair_rows(c.values + c.order[b] * size, c.shape.height, c.shape.width, TileAfterTile<kUnit>{c.shape.width},
                  weights + b * (size / 2));
    }
#pragma omp for schedule(static, 1)
    for (int id = 0; id < grid.token_groups * grid.line_groups; id++)
      pass.run_share(w.share(id, omp_get_thread_num()), chunk);
    _mm_sfence();  // streamed gradients are there for all threads
    RAREFY_TILE_RELEASE();
    if (c.grad_values) add_groups(w.value_sums.as<float>(), w.values(), grid.token_groups, c.grad_values);
    if (c.grad_bias) add_groups(w.bias_sums.as<float>(), c.shape.rows, grid.token_groups, c.grad_bias);
  }
  return true;
}

}  // namespace

bool blocks_backward(const BlocksBackwardCall& c) {
  if (c.tokens <= 0) {
    clear_gradients(c);
    return true;
  }
  BlocksBackwardCall call = c;
  call.threads = useful_threads(c.threads, c.blocks() * c.shape.size() * c.tokens);
  return c.shape.height % 32 ? backward_with<8>(call) : backward_with<16>(call);
}

extern const BlocksTable blocks_kernels;
const BlocksTable blocks_kernels{.forward = blocks_forward, .backward = blocks_backward};

}  // namespace rarefy::RAREFY_ISA
