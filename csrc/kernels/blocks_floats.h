// The products of the block kernels in float32; bfloat16 is widened in the panels and rounded in the results.
#pragma once
#include "blocks_product.h"

namespace rarefy::RAREFY_ISA {

// kLength floats a vector of outputs; panels of kUnit inputs of a product, and of kGradUnit columns of x for dL/dW.
template <int kLength, int kUnit, int kXUnit, class ElementType>
struct FloatEngine {
  using Element = ElementType;
  static constexpr int kCell = 1;           // features, or tokens, of a cell
  static constexpr int kRoom = 1;           // panels have room for a multiple of these tokens
  static constexpr int kRun = kTokenRun;    // tokens that are finished before the next ones
  static constexpr bool kConverts = false;  // whether dL/dx needs weights in another form
  static constexpr bool kMayAsk = RAREFY_VECTOR_BYTES == 64;  // whether products ask for what is next
  static constexpr int kPacked = kUnit < kLanes ? kUnit : kLanes;

  // How often a block asks for what is next: in its product with `tokens` inputs of `depth`, and in its gradient.
  static int64_t product_steps(int64_t tokens, int depth, int width) {
    const int vectors = (width + kLength - 1) / kLength;
    return tokens * depth * vectors / kSums;
  }
  static int64_t gradient_steps(int64_t tokens, int height, int width) {
    const int pairs = width / (2 * kLength);
    const int tall = width % (2 * kLength) ? height / kTallGradRows<kUnit> : 0;
    return tokens * (pairs * (height / kGradRows) + tall);
  }

  static void begin_products() {}
  static void begin_gradients() {}
  static void end() {}

  static void forward_weights(const float* block, const BlockShape& s, float* target) {
    transpose_block(block, s.height, s.width, target);
  }
  static void backward_weights(const float*, const BlockShape&, float*) {}

  static void pack_inputs(const Element* source, int64_t stride, int tokens, int room, int columns, float* panels,
                          float* sums) {
    pack_panels<kPacked, kUnit>(source, stride, tokens, room, columns, panels, sums);
  }
  static void multiply(const LineProduct& p, int token, int end, Element* out, int64_t stride) {
    multiply_line<FloatProduct, kLength, kUnit, kMayAsk>(p, token, end, out, stride);
  }

  // The panels that dL/dx has read serve dL/dW too.
  static constexpr bool kSharesGrad = true;
  static void pack_grad(const Element*, int64_t, int, int, int, float*) {}
  static void pack_x(const Element* source, int64_t stride, int tokens, int room, int columns, float* panels) {
    pack_panels<kLength, kXUnit>(source, stride, tokens, room, columns, panels, nullptr);
  }
  static void gradient(const BlockGradient& g) { gradient_block<FloatProduct, kLength, kUnit, kXUnit, kMayAsk>(g); }
};

}  // namespace rarefy::RAREFY_ISA
