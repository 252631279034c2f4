// The fused backward pass of the block kernels, whatever computes the products: a panel of dL/dy that dL/dx has just read
// is still near for dL/dW.
#pragma once
#include <omp.h>

#include "blocks_product.h"
#include "buffer.h"

namespace rarefy::RAREFY_ISA {

// Runs of tokens in a chunk. More need fewer additions to sums of dL/dW in memory, which counts where there are many weights;
// fewer stay in the second-level cache.
RAREFY_INLINE int backward_runs(const BlocksBackwardCall& c) {
  const int64_t weight = values_a_feature(c);
  if (weight <= 40) return 1;
  return weight <= 80 ? 2 : 3;
}

// Block columns of x that are copied to panels together.
RAREFY_INLINE int lines_at_once(const BlockShape& s) { return max_of(1, 256 / s.width); }

// What one thread works on: block columns [lines.begin, lines.end) and tokens [token, end).
struct BackwardShare {
  Range lines;
  int64_t token;
  int64_t end;
  const float* weights;  // blocks as dL/dx takes them
  float* values;         // sums of dL/dW, in the order of W
  float* bias;           // sums of dL/db, or null
  float* inputs;         // panels of dL/dy for dL/dx
  float* grad;           // panels of dL/dy for dL/dW
  float* x;              // panels of some block columns of x
};

// Threads = token groups × groups of block columns. Each token group but the first needs sums of its own.
struct BackwardGrid {
  int token_groups;
  int line_groups;
};

RAREFY_INLINE BackwardGrid backward_grid(const BlocksBackwardCall& c, int run) {
  constexpr int64_t most_sums = int64_t{32} << 20;
  const int64_t values = c.blocks() * c.shape.size();
  BackwardGrid grid{1, c.threads};
  for (int groups = 1; groups <= c.threads && static_cast<int64_t>(groups) * run <= c.tokens; groups++)
    if (c.threads % groups == 0 && (groups <= 2 || groups * values <= most_sums))
      grid = {groups, c.threads / groups};
  return grid;
}

// Memory of one call.
template <class Engine>
struct BackwardWorkspace {
  const BlocksBackwardCall& call;
  BackwardGrid grid;
  size_t grad_cells;  // a thread
  size_t x_cells;
  size_t thread_cells;
  Buffer weights;
  Buffer value_sums;
  Buffer bias_sums;
  Buffer panels;

  BackwardWorkspace(const BlocksBackwardCall& c, BackwardGrid g, int chunk)
      : call(c), grid(g), grad_cells(static_cast<size_t>(chunk) * c.shape.rows / Engine::kCell),
        x_cells(static_cast<size_t>(chunk) * lines_at_once(c.shape) * c.shape.width / Engine::kCell),
        thread_cells(grad_cells * (Engine::kSharesGrad ? 1 : 2) + x_cells),
        weights(Engine::kConverts && c.grad_x ? values() / Engine::kCell * sizeof(float) : 0),
        value_sums(c.grad_values ? values() * (g.token_groups - 1) * sizeof(float) : 0),
        bias_sums(c.grad_bias ? static_cast<size_t>(c.shape.rows) * (g.token_groups - 1) * sizeof(float) : 0),
        panels(thread_cells * c.threads * sizeof(float)) {}

  int64_t values() const { return call.blocks() * call.shape.size(); }
  bool ok() const { return weights.ok() && value_sums.ok() && bias_sums.ok() && panels.ok(); }

  BackwardShare share(int id, int thread) const {
    const int group = id / grid.line_groups, part = id % grid.line_groups;
    float* inputs = panels.as<float>() + thread_cells * thread;
    float* grad = Engine::kSharesGrad ? inputs : inputs + grad_cells;
    const int64_t rows = call.shape.rows;
    float* bias = group ? bias_sums.as<float>() + rows * (group - 1) : call.grad_bias;
    return {
        .lines = line_range(call.by_column, grid.line_groups, part),
        .token = share_begin(call.tokens, grid.token_groups, group),
        .end = share_begin(call.tokens, grid.token_groups, group + 1),
        .weights = Engine::kConverts ? weights.as<float>() : call.values,
        .values = group ? value_sums.as<float>() + values() * (group - 1) : call.grad_values,
        .bias = call.grad_bias && part == 0 ? bias : nullptr,
        .inputs = inputs,
        .grad = grad,
        .x = grad + grad_cells,
    };
  }
};

// target += the sums of the other token groups, in their order.
static inline void add_groups(const float* sums, int64_t size, int groups, float* target) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < size; i++)
    for (int g = 0; g < groups - 1; g++) target[i] += sums[size * g + i];
}

template <class Engine>
struct BlocksBackward {
  using Element = typename Engine::Element;
  const BlocksBackwardCall& call;

  // A chunk of tokens; where it is the `first` of its share, sums start from zero.
  struct Chunk {
    int64_t token;
    int tokens;
    int room;
    bool first;
  };

  int64_t blocks_of(const BackwardShare& share) const {
    return call.by_column.starts[share.lines.end] - call.by_column.starts[share.lines.begin];
  }

  // x of a chunk, which is read after dL/dx. Where threads share its columns, what each reads is no run of memory.
  Ahead x_of(const BackwardShare& share, const Chunk& chunk) const {
    if constexpr (Engine::kMayAsk) {
      const BlockShape& s = call.shape;
      if (!call.grad_values || share.lines.end - share.lines.begin < call.by_column.lines) return {};
      const int64_t bytes = int64_t{chunk.tokens} * s.columns * static_cast<int64_t>(sizeof(Element));
      const Element* first = static_cast<const Element*>(call.x) + chunk.token * s.columns;
      return {first, bytes, blocks_of(share) * Engine::product_steps(chunk.tokens, s.height, s.width)};
    }
    return {};
  }

  // dL/dy of the next chunk, which is read after dL/dW.
  Ahead next_grad(const BackwardShare& share, const Chunk& chunk) const {
    if constexpr (Engine::kMayAsk) {
      const BlockShape& s = call.shape;
      const int64_t next = chunk.token + chunk.tokens;
      const int64_t present = min_of(static_cast<int64_t>(chunk.tokens), share.end - next);
      if (present <= 0) return {};
      const int64_t bytes = present * s.rows * static_cast<int64_t>(sizeof(Element));
      const Element* first = static_cast<const Element*>(call.grad) + next * s.rows;
      return {first, bytes, blocks_of(share) * Engine::gradient_steps(chunk.tokens, s.height, s.width)};
    }
    return {};
  }

  // dL/dx, one run of tokens after the other.
  void multiply(const BackwardShare& share, const Chunk& chunk) const {
    const BlockShape& s = call.shape;
    Element* grad_x = static_cast<Element*>(call.grad_x) + chunk.token * s.columns;
    Engine::begin_products();
    Ahead x_ahead = x_of(share, chunk);
    for (int token = 0; token < chunk.tokens; token += Engine::kRun)
      for (int line = share.lines.begin; line < share.lines.end; line++) {
        const int32_t begin = call.by_column.starts[line];
        const LineProduct product{
            .indices = call.by_column.indices + begin,
            .places = call.order + begin,
            .blocks = call.by_column.starts[line + 1] - begin,
            .depth = s.height / Engine::kCell,
            .width = s.width,
            .weights = share.weights,
            .panels = share.inputs,
            .room = chunk.room,
            .bias = nullptr,
            .ahead = &x_ahead,
        };
        const int end = min_of(chunk.tokens, token + Engine::kRun);
        Engine::multiply(product, token, end, grad_x + static_cast<int64_t>(line) * s.width, s.columns);
      }
  }

  // dL/dW of the active blocks.
  void add_gradients(const BackwardShare& share, const Chunk& chunk) const {
    const BlockShape& s = call.shape;
    const int at_once = lines_at_once(s), steps = chunk.room / Engine::kCell;
    Engine::begin_gradients();
    Ahead grad_ahead = next_grad(share, chunk);
    for (int begin = share.lines.begin; begin < share.lines.end; begin += at_once) {
      const int end = min_of(share.lines.end, begin + at_once);
      const int64_t column = static_cast<int64_t>(begin) * s.width;
      const Element* x = static_cast<const Element*>(call.x) + chunk.token * s.columns + column;
      Engine::pack_x(x, s.columns, chunk.tokens, chunk.room, (end - begin) * s.width, share.x);
      for (int line = begin; line < end; line++)
        for (int32_t q = call.by_column.starts[line]; q < call.by_column.starts[line + 1]; q++)
          Engine::gradient({
              .grad = share.grad + static_cast<size_t>(call.by_column.indices[q]) * s.height * steps,
              .x = share.x + static_cast<size_t>(line - begin) * s.width * steps,
              .steps = steps,
              .height = s.height,
              .width = s.width,
              .sums = share.values + call.order[q] * s.size(),
              .first = chunk.first,
              .ahead = &grad_ahead,
          });
    }
  }

  void run_share(const BackwardShare& share, int most_tokens) const {
    const BlockShape& s = call.shape;
    if (share.bias) memset(share.bias, 0, static_cast<size_t>(s.rows) * sizeof(float));
    for (int64_t token = share.token; token < share.end; token += most_tokens) {
      const int tokens = static_cast<int>(min_of(static_cast<int64_t>(most_tokens), share.end - token));
      const Chunk chunk{
          .token = token,
          .tokens = tokens,
          .room = round_up_to(tokens, Engine::kRoom),
          .first = token == share.token,
      };
      const Element* grad = static_cast<const Element*>(call.grad) + token * s.rows;
      if (call.grad_x || share.bias || Engine::kSharesGrad)
        Engine::pack_inputs(grad, s.rows, tokens, chunk.room, s.rows, share.inputs, share.bias);
      if (call.grad_values) Engine::pack_grad(grad, s.rows, tokens, chunk.room, s.rows, share.grad);
      if (call.grad_x) multiply(share, chunk);
      if (call.grad_values) add_gradients(share, chunk);
    }
  }

  bool run() const {
    const BackwardGrid grid = backward_grid(call, Engine::kRun);
    const int chunk = chunk_tokens(call.tokens, backward_runs(call) * Engine::kRun, Engine::kRun, grid.token_groups);
    const BackwardWorkspace<Engine> w(call, grid, chunk);
    if (!w.ok()) return false;
    const int64_t size = call.shape.size();
#pragma omp parallel num_threads(call.threads)
    {
      if (Engine::kConverts && call.grad_x) {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < call.blocks(); b++)
          Engine::backward_weights(call.values + b * size, call.shape,
                                   w.weights.template as<float>() + b * (size / Engine::kCell));
      }
#pragma omp for schedule(static, 1)
      for (int id = 0; id < grid.token_groups * grid.line_groups; id++)
        run_share(w.share(id, omp_get_thread_num()), chunk);
      Engine::end();
      if (call.grad_values) add_groups(w.value_sums.template as<float>(), w.values(), grid.token_groups, call.grad_values);
      if (call.grad_bias) add_groups(w.bias_sums.template as<float>(), call.shape.rows, grid.token_groups, call.grad_bias);
    }
    return true;
  }
};

// What the pass does without tokens.
RAREFY_INLINE void clear_gradients(const BlocksBackwardCall& c) {
  if (c.grad_values) memset(c.grad_values, 0, static_cast<size_t>(c.blocks() * c.shape.size()) * sizeof(float));
  if (c.grad_bias) memset(c.grad_bias, 0, static_cast<size_t>(c.shape.rows) * sizeof(float));
}

}  // namespace rarefy::RAREFY_ISA
