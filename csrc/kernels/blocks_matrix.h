// Products of the block kernels with the matrix unit: 32 tokens and 32 outputs at a time, two tiles each way.
#pragma once
#include "blocks_pairs.h"
#include "blocks_tiles.h"

namespace rarefy::RAREFY_ISA {

// Rows [0, tokens) of sums [16][kTiles * 16], as bfloat16.
template <int kTiles>
void write_sums(const float* sums, int tokens, Bfloat16* out, int64_t stride) {
  for (int t = 0; t < tokens; t++)
    RAREFY_UNROLL for (int i = 0; i < kTiles; i++)
      store(out + t * stride + i * kLanes, load(sums + (t * kTiles + i) * kLanes));
}

// 32 tokens from `token` on, of which those before `end` are written, and 32 outputs.
template <int kUnit>
void multiply_tiles(const LineProduct& p, int token, int end, int output, Bfloat16* out, int64_t stride) {
  if (p.bias) {  // 16 times the same row
    RAREFY_TILE_LOAD(0, p.bias + output, 0);
    RAREFY_TILE_LOAD(1, p.bias + output + 16, 0);
    RAREFY_TILE_LOAD(2, p.bias + output, 0);
    RAREFY_TILE_LOAD(3, p.bias + output + 16, 0);
  } else {
    RAREFY_TILE_ZERO(0);
    RAREFY_TILE_ZERO(1);
    RAREFY_TILE_ZERO(2);
    RAREFY_TILE_ZERO(3);
  }
  const int depth = p.depth;  // in registers: loads of tiles are barriers
  const int64_t width = p.width;
  const size_t panel = static_cast<size_t>(p.room) * kUnit;
  for (int q = 0; q < p.blocks; q++) {
    const float* w = p.weight(q) + output;
    const float* x = p.panels + static_cast<size_t>(p.indices[q]) * depth * p.room + static_cast<size_t>(token) * kUnit;
    for (int unit = 0; unit < depth; unit += kUnit) {
      RAREFY_TILE_LOAD(6, w, width * 4);
      RAREFY_TILE_LOAD(4, x, kUnit * 4);
      RAREFY_TILE_LOAD(7, w + 16, width * 4);
      RAREFY_TILE_LOAD(5, x + 16 * kUnit, kUnit * 4);
      RAREFY_TILE_MULTIPLY(0, 4, 6);
      RAREFY_TILE_MULTIPLY(1, 4, 7);
      RAREFY_TILE_MULTIPLY(2, 5, 6);
      RAREFY_TILE_MULTIPLY(3, 5, 7);
      w += kUnit * width;
      x += panel;
    }
  }
  alignas(64) float sums[16 * 32];
  RAREFY_TILE_STORE(0, sums, 128);
  RAREFY_TILE_STORE(1, sums + 16, 128);
  write_sums<2>(sums, min_of(16, end - token), out + token * stride + output, stride);
  if (token + 16 >= end) return;
  RAREFY_TILE_STORE(2, sums, 128);
  RAREFY_TILE_STORE(3, sums + 16, 128);
  write_sums<2>(sums, min_of(16, end - token - 16), out + (token + 16) * stride + output, stride);
}

// The same for 16 outputs, where 32 do not divide the block.
template <int kUnit>
void multiply_narrow_tiles(const LineProduct& p, int token, int end, int output, Bfloat16* out, int64_t stride) {
  if (p.bias) {
    RAREFY_TILE_LOAD(0, p.bias + output, 0);
    RAREFY_TILE_LOAD(2, p.bias + output, 0);
  } else {
    RAREFY_TILE_ZERO(0);
    RAREFY_TILE_ZERO(2);
  }
  const int depth = p.depth;  // in registers: loads of tiles are barriers
  const int64_t width = p.width;
  const size_t panel = static_cast<size_t>(p.room) * kUnit;
  for (int q = 0; q < p.blocks; q++) {
    const float* w = p.weight(q) + output;
    const float* x = p.panels + static_cast<size_t>(p.indices[q]) * depth * p.room + static_cast<size_t>(token) * kUnit;
    for (int unit = 0; unit < depth; unit += kUnit) {
      RAREFY_TILE_LOAD(6, w, width * 4);
      RAREFY_TILE_LOAD(4, x, kUnit * 4);
      RAREFY_TILE_LOAD(5, x + 16 * kUnit, kUnit * 4);
      RAREFY_TILE_MULTIPLY(0, 4, 6);
      RAREFY_TILE_MULTIPLY(2, 5, 6);
      w += kUnit * width;
      x += panel;
    }
  }
  alignas(64) float sums[16 * 16];
  RAREFY_TILE_STORE(0, sums, 64);
  write_sums<1>(sums, min_of(16, end - token), out + token * stride + output, stride);
  if (token + 16 >= end) return;
  RAREFY_TILE_STORE(2, sums, 64);
  write_sums<1>(sums, min_of(16, end - token - 16), out + (token + 16) * stride + output, stride);
}

// Sums [kDown * 16][kAcross * 16] of dL/dW from (row, column) of the block on.
template <int kDown, int kAcross>
void gradient_tiles(const BlockGradient& g, int row, int column) {
  const int64_t bytes = static_cast<int64_t>(g.width) * 4;
  const size_t panel = static_cast<size_t>(g.steps) * 16;
  const float* grad = g.grad + row / 16 * panel;
  const float* x = g.x + column / 16 * panel;
  float* sums = g.sums + static_cast<size_t>(row) * g.width + column;
  float* lower = sums + static_cast<size_t>(16) * g.width;
  if (g.first) {
    RAREFY_TILE_ZERO(0);
    RAREFY_TILE_ZERO(1);
    RAREFY_TILE_ZERO(2);
    RAREFY_TILE_ZERO(3);
  } else {
    RAREFY_TILE_LOAD(0, sums, bytes);
    if (kAcross == 2) RAREFY_TILE_LOAD(1, sums + 16, bytes);
    if (kDown == 2) RAREFY_TILE_LOAD(2, lower, bytes);
    if (kDown == 2 && kAcross == 2) RAREFY_TILE_LOAD(3, lower + 16, bytes);
  }
  for (int step = 0; step < g.steps; step += 16) {
    const size_t at = static_cast<size_t>(step) * 16;
    RAREFY_TILE_LOAD(6, x + at, 64);
    RAREFY_TILE_LOAD(4, grad + at, 64);
    if (kAcross == 2) RAREFY_TILE_LOAD(7, x + panel + at, 64);
    if (kDown == 2) RAREFY_TILE_LOAD(5, grad + panel + at, 64);
    RAREFY_TILE_MULTIPLY(0, 4, 6);
    if (kAcross == 2) RAREFY_TILE_MULTIPLY(1, 4, 7);
    if (kDown == 2) RAREFY_TILE_MULTIPLY(2, 5, 6);
    if (kDown == 2 && kAcross == 2) RAREFY_TILE_MULTIPLY(3, 5, 7);
  }
  RAREFY_TILE_STORE(0, sums, bytes);
  if (kAcross == 2) RAREFY_TILE_STORE(1, sums + 16, bytes);
  if (kDown == 2) RAREFY_TILE_STORE(2, lower, bytes);
  if (kDown == 2 && kAcross == 2) RAREFY_TILE_STORE(3, lower + 16, bytes);
}

// kUnit cells of inputs in a panel.
template <int kUnit>
struct PairEngine {
  using Element = Bfloat16;
  static constexpr int kCell = 2;
  static constexpr int kRoom = 32;
  static constexpr int kRun = 64;
  static constexpr bool kConverts = true;
  static constexpr bool kSharesGrad = false;

  static void begin_products() { configure_tiles(kUnit); }
  static void begin_gradients() { configure_tiles(16); }
  static void end() { RAREFY_TILE_RELEASE(); }

  static void forward_weights(const float* block, const BlockShape& s, float* target) {
    pair_columns(block, s.height, s.width, target);
  }
  static void backward_weights(const float* block, const BlockShape& s, float* target) {
    pair_rows(block, s.height, s.width, target);
  }
  static void pack_inputs(const Bfloat16* source, int64_t stride, int tokens, int room, int columns, float* panels,
                          float* sums) {
    pack_features<kUnit>(source, stride, tokens, room, columns, panels, sums);
  }
  static void multiply(const LineProduct& p, int token, int end, Bfloat16* out, int64_t stride) {
    int output = 0;
    for (; output + 32 <= p.width; output += 32)
      for (int t = token; t < end; t += 32) multiply_tiles<kUnit>(p, t, end, output, out, stride);
    if (output < p.width)
      for (int t = token; t < end; t += 32) multiply_narrow_tiles<kUnit>(p, t, end, output, out, stride);
  }
  static void pack_grad(const Bfloat16* source, int64_t stride, int tokens, int room, int columns, float* panels) {
    pack_tokens<true>(source, stride, tokens, room, columns, panels);
  }
  static void pack_x(const Bfloat16* source, int64_t stride, int tokens, int room, int columns, float* panels) {
    pack_tokens<false>(source, stride, tokens, room, columns, panels);
  }
  static void gradient(const BlockGradient& g) {
    for (int row = 0; row < g.height; row += 32)
      for (int column = 0; column < g.width; column += 32) {
        const bool tall = row + 32 <= g.height, wide = column + 32 <= g.width;
        if (tall && wide)
          gradient_tiles<2, 2>(g, row, column);
        else if (tall)
          gradient_tiles<2, 1>(g, row, column);
        else if (wide)
          gradient_tiles<1, 2>(g, row, column);
        else
          gradient_tiles<1, 1>(g, row, column);
      }
  }
};

}  // namespace rarefy::RAREFY_ISA
