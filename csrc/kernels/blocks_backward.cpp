// The fused backward pass for a W of blocks: a panel of dL/dy that dL/dx has just read is still near for dL/dW.
#include <omp.h>

#include "operations.h"
#include "blocks_product.h"
#include "buffer.h"

namespace rarefy::RAREFY_ISA {
namespace {

// Tokens of a chunk. More need fewer additions to sums of dL/dW in memory, fewer stay in the second-level cache.
constexpr int kBackwardTokens = 3 * kTokenRun;

// Block columns of x that are copied to panels together.
int lines_at_once(const BlockShape& s) { return max_of(1, 256 / s.width); }

// What one thread works on: block columns [lines.begin, lines.end) and tokens [token, end).
struct Share {
  Range lines;
  int64_t token;
  int64_t end;
  float* values;  // sums of dL/dW, in the order of W
  float* bias;    // sums of dL/db, or null
  float* grad;    // panels of dL/dy
  float* x;       // panels of some block columns of x
};

// A chunk of tokens, with dL/dy in panels.
struct Chunk {
  int64_t token;
  int tokens;
  bool first;  // of its share: sums start from zero
};

// dL/dx, one run of tokens after the other.
template <int kLength, int kGradUnit, class Element>
void multiply_chunk(const BlocksBackwardCall& c, const Share& share, const Chunk& chunk) {
  const BlockShape& s = c.shape;
  Element* grad_x = static_cast<Element*>(c.grad_x) + chunk.token * s.columns;
  for (int token = 0; token < chunk.tokens; token += kTokenRun)
    for (int line = share.lines.begin; line < share.lines.end; line++) {
      const int32_t begin = c.by_column.starts[line];
      const LineProduct product{
          .indices = c.by_column.indices + begin,
          .places = c.order + begin,
          .blocks = c.by_column.starts[line + 1] - begin,
          .depth = s.height,
          .width = s.width,
          .weights = c.values,
          .panels = share.grad,
          .tokens = chunk.tokens,
          .bias = nullptr,
      };
      const int end = min_of(chunk.tokens, token + kTokenRun);
      multiply_line<kLength, kGradUnit>(product, token, end, grad_x + static_cast<int64_t>(line) * s.width, s.columns);
    }
}

// dL/dW of the blocks of one block column, whose x is in panels.
template <int kLength, int kGradUnit, int kUnit>
void add_gradients(const BlocksBackwardCall& c, const Share& share, const Chunk& chunk, int line, const float* x) {
  const BlockShape& s = c.shape;
  for (int32_t q = c.by_column.starts[line]; q < c.by_column.starts[line + 1]; q++)
    gradient_block<kLength, kGradUnit, kUnit>({
        .grad = share.grad + static_cast<size_t>(c.by_column.indices[q]) * s.height * chunk.tokens,
        .x = x,
        .tokens = chunk.tokens,
        .height = s.height,
        .width = s.width,
        .sums = share.values + c.order[q] * s.size(),
        .first = chunk.first,
    });
}

template <int kLength, int kGradUnit, int kUnit, class Element>
void run_share(const BlocksBackwardCall& c, const Share& share, int most_tokens) {
  constexpr int kPacked = kGradUnit < kLanes ? kGradUnit : kLanes;
  const BlockShape& s = c.shape;
  if (share.bias) memset(share.bias, 0, static_cast<size_t>(s.rows) * sizeof(float));
  for (int64_t token = share.token; token < share.end; token += most_tokens) {
    const int tokens = static_cast<int>(min_of(static_cast<int64_t>(most_tokens), share.end - token));
    const Chunk chunk{.token = token, .tokens = tokens, .first = token == share.token};
    const Element* grad = static_cast<const Element*>(c.grad) + token * s.rows;
    pack_panels<kPacked, kGradUnit>(grad, s.rows, tokens, s.rows, share.grad, share.bias);
    if (c.grad_x) multiply_chunk<kLength, kGradUnit, Element>(c, share, chunk);
    if (!c.grad_values) continue;
    const int at_once = lines_at_once(s);
    for (int begin = share.lines.begin; begin < share.lines.end; begin += at_once) {
      const int end = min_of(share.lines.end, begin + at_once);
      const int64_t column = static_cast<int64_t>(begin) * s.width;
      const Element* x = static_cast<const Element*>(c.x) + token * s.columns + column;
      pack_panels<kLength, kUnit>(x, s.columns, tokens, (end - begin) * s.width, share.x, nullptr);
      for (int line = begin; line < end; line++)
        add_gradients<kLength, kGradUnit, kUnit>(
            c, share, chunk, line, share.x + static_cast<size_t>(line - begin) * s.width * tokens);
    }
  }
}

// Threads = token groups × groups of block columns. Each token group but the first needs sums of its own.
struct Grid {
  int token_groups;
  int line_groups;
};
Grid make_grid(const BlocksBackwardCall& c) {
  constexpr int64_t most_sums = int64_t{32} << 20;
  const int64_t values = c.blocks() * c.shape.size();
  Grid grid{1, c.threads};
  for (int groups = 1; groups <= c.threads && groups * kTokenRun <= c.tokens; groups++)
    if (c.threads % groups == 0 && (groups <= 2 || groups * values <= most_sums))
      grid = {groups, c.threads / groups};
  return grid;
}

// Memory of one call.
struct Workspace {
  int64_t values;  // of W
  int64_t rows;
  size_t grad_floats;  // a thread
  size_t x_floats;
  Buffer value_sums;
  Buffer bias_sums;
  Buffer panels;

  Workspace(const BlocksBackwardCall& c, const Grid& g, int chunk)
      : values(c.blocks() * c.shape.size()), rows(c.shape.rows),
        grad_floats(static_cast<size_t>(chunk) * c.shape.rows), x_floats(static_cast<size_t>(chunk) * lines_at_once(c.shape) * c.shape.width),
        value_sums(c.grad_values ? values * (g.token_groups - 1) * sizeof(float) : 0),
        bias_sums(c.grad_bias ? rows * (g.token_groups - 1) * sizeof(float) : 0),
        panels((grad_floats + x_floats) * c.threads * sizeof(float)) {}

  bool ok() const { return value_sums.ok() && bias_sums.ok() && panels.ok(); }
  Share share(const BlocksBackwardCall& c, const Grid& grid, int id, int thread) const {
    const int group = id / grid.line_groups, part = id % grid.line_groups;
    float* grad = panels.as<float>() + (grad_floats + x_floats) * thread;
    float* bias = group ? bias_sums.as<float>() + rows * (group - 1) : c.grad_bias;
    return {
        .lines = line_range(c.by_column, grid.line_groups, part),
        .token = share_begin(c.tokens, grid.token_groups, group),
        .end = share_begin(c.tokens, grid.token_groups, group + 1),
        .values = group ? value_sums.as<float>() + values * (group - 1) : c.grad_values,
        .bias = c.grad_bias && part == 0 ? bias : nullptr,
        .grad = grad,
        .x = grad + grad_floats,
    };
  }
};

// target += the sums of the other token groups, in their order.
void reduce(const float* sums, int64_t size, int groups, float* target) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < size; i++)
    for (int g = 0; g < groups - 1; g++) target[i] += sums[size * g + i];
}

template <int kLength, int kGradUnit, int kUnit, class Element>
bool backward_of(const BlocksBackwardCall& c) {
  const Grid grid = make_grid(c);
  const int chunk = chunk_tokens(c.tokens, kBackwardTokens, grid.token_groups);
  const Workspace w(c, grid, chunk);
  if (!w.ok()) return false;
#pragma omp parallel num_threads(c.threads)
  {
    const int shares = grid.token_groups * grid.line_groups;
#pragma omp for schedule(static, 1)
    for (int id = 0; id < shares; id++)
      run_share<kLength, kGradUnit, kUnit, Element>(c, w.share(c, grid, id, omp_get_thread_num()), chunk);
    if (c.grad_values) reduce(w.value_sums.as<float>(), w.values, grid.token_groups, c.grad_values);
    if (c.grad_bias) reduce(w.bias_sums.as<float>(), w.rows, grid.token_groups, c.grad_bias);
  }
  return true;
}

template <class Element>
bool backward_in(const BlocksBackwardCall& c) {
  constexpr int kWide = kLanes;
  constexpr int kNarrow = kLanes < 8 ? kLanes : 8;
  const bool tall = c.shape.height % 16 == 0, wide = c.shape.width % 16 == 0;
  if (wide) return tall ? backward_of<kWide, 16, 16, Element>(c) : backward_of<kWide, 8, 16, Element>(c);
  return tall ? backward_of<kNarrow, 16, 8, Element>(c) : backward_of<kNarrow, 8, 8, Element>(c);
}

}  // namespace

bool blocks_backward(const BlocksBackwardCall& c) {
  if (c.tokens <= 0) {
    if (c.grad_values) memset(c.grad_values, 0, static_cast<size_t>(c.blocks() * c.shape.size()) * sizeof(float));
    if (c.grad_bias) memset(c.grad_bias, 0, static_cast<size_t>(c.shape.rows) * sizeof(float));
    return true;
  }
  BlocksBackwardCall call = c;
  call.threads = useful_threads(c.threads, c.blocks() * c.shape.size() * c.tokens);
  return c.element == Element::kFloat32 ? backward_in<float>(call) : backward_in<Bfloat16>(call);
}

}  // namespace rarefy::RAREFY_ISA
