// Products of the block kernels with instructions that add the two products of a pair of bfloat16 (avx512_bf16).
#pragma once
#include "blocks_pairs.h"

namespace rarefy::RAREFY_ISA {

struct PairProduct {
  static inline __attribute__((always_inline)) Vec add(Vec sum, float input, Vec weight) {
    const Vec inputs = Vec{} + input;
    return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(inputs),
                                                  reinterpret_cast<__m512bh>(weight)));
  }
};

// kUnit cells of inputs in a panel.
template <int kUnit>
struct PairEngine {
  using Element = Bfloat16;
  static constexpr int kCell = 2;
  static constexpr int kRoom = 2;
  static constexpr int kRun = kTokenRun;
  static constexpr bool kConverts = true;
  static constexpr bool kSharesGrad = false;

  static void begin_products() {}
  static void begin_gradients() {}
  static void end() {}

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
    multiply_line<PairProduct, kLanes, kUnit>(p, token, end, out, stride);
  }
  static void pack_grad(const Bfloat16* source, int64_t stride, int tokens, int room, int columns, float* panels) {
    pack_tokens<false>(source, stride, tokens, room, columns, panels);
  }
  static void pack_x(const Bfloat16* source, int64_t stride, int tokens, int room, int columns, float* panels) {
    pack_tokens<false>(source, stride, tokens, room, columns, panels);
  }
  static void gradient(const BlockGradient& g) { gradient_block<PairProduct, kLanes, 16, 16>(g); }
};

}  // namespace rarefy::RAREFY_ISA
