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

RAREFY_INLINE UintVec halves(const Bfloat16* p) {
  return __builtin_convertvector(*reinterpret_cast<const HalfVec*>(p), UintVec);
}

// source [tokens, columns] -> cells of two neighbouring features, [columns / 2 / kUnit][room][kUnit]; tokens from `tokens`
// to `room` are zero. Adds the column sums to `sums` where that is not null.
template <int kUnit>
void pack_features(const Bfloat16* source, int64_t stride, int tokens, int room, int columns, float* panels, float* sums) {
  for (int begin = 0; begin < tokens; begin += kTokenRun) {
    const int end = min_of(tokens, begin + kTokenRun);
    for (int c = 0; c < columns; c += 2 * kUnit) {
      float* panel = panels + static_cast<size_t>(c / 2) * room;
      Vec sum[kUnit / 8] = {};
      for (int t = begin; t < end; t++) {
        const Bfloat16* p = source + t * stride + c;
        memcpy(panel + static_cast<size_t>(t) * kUnit, p, kUnit * 4);
        if (sums)
          RAREFY_UNROLL for (int i = 0; i < kUnit / 8; i++) sum[i] += load(p + i * kLanes);
      }
      if (sums)
        RAREFY_UNROLL for (int i = 0; i < kUnit / 8; i++)
          store(sums + c + i * kLanes, load(sums + c + i * kLanes) + sum[i]);
    }
  }
  for (int c = 0; c < columns && tokens < room; c += 2 * kUnit)
    memset(panels + static_cast<size_t>(c / 2) * room + static_cast<size_t>(tokens) * kUnit, 0,
           static_cast<size_t>(room - tokens) * kUnit * 4);
}

// source [tokens, columns] -> cells of two neighbouring tokens, [columns / 16][room / 2][16]; tokens from `tokens` to `room`
// are zero.
static inline void pack_tokens(const Bfloat16* source, int64_t stride, int tokens, int room, int columns, float* panels) {
  constexpr int kStep = 32;
  for (int begin = 0; begin < room; begin += kStep)
    for (int c = 0; c < columns; c += kLanes) {
      float* panel = panels + static_cast<size_t>(c) * (room / 2) + static_cast<size_t>(begin / 2) * kLanes;
      Vec square[kLanes];
      RAREFY_UNROLL for (int i = 0; i < kLanes; i++) {
        const int t = begin + 2 * i;
        const UintVec even = t < tokens ? halves(source + t * stride + c) : UintVec{};
        const UintVec odd = t + 1 < tokens ? halves(source + (t + 1) * stride + c) : UintVec{};
        square[i] = reinterpret_cast<Vec>(even | odd << 16);
      }
      const int present = min_of(kLanes, (room - begin) / 2);
      for (int i = 0; i < present; i++) store(panel + i * kLanes, square[i]);
    }
}

// kUnit cells of inputs in a panel.
template <int kUnit>
struct PairEngine {
  using Element = Bfloat16;
  static constexpr int kCell = 2;
  static constexpr int kRoom = 2;
  static constexpr int kRun = kTokenRun;
  static constexpr bool kConverts = true;
  static constexpr bool kMayAsk = false;
  static constexpr bool kSharesGrad = false;

  static void begin_products() {}
  static void begin_gradients() {}
  static void end() {}

  static void forward_weights(const float* block, const BlockShape& s, float* target) {
    pair_columns(block, s.height, s.width, PairAfterPair{s.height}, target);
  }
  static void backward_weights(const float* block, const BlockShape& s, float* target) {
    pair_rows(block, s.height, s.width, PairAfterPair{s.width}, target);
  }
  static void pack_inputs(const Bfloat16* source, int64_t stride, int tokens, int room, int columns, float* panels,
                          float* sums) {
    pack_features<kUnit>(source, stride, tokens, room, columns, panels, sums);
  }
  static void multiply(const LineProduct& p, int token, int end, Bfloat16* out, int64_t stride) {
    multiply_line<PairProduct, kLanes, kUnit, kMayAsk>(p, token, end, out, stride);
  }
  static void pack_grad(const Bfloat16* source, int64_t stride, int tokens, int room, int columns, float* panels) {
    pack_tokens(source, stride, tokens, room, columns, panels);
  }
  static void pack_x(const Bfloat16* source, int64_t stride, int tokens, int room, int columns, float* panels) {
    pack_tokens(source, stride, tokens, room, columns, panels);
  }
  static void gradient(const BlockGradient& g) { gradient_block<PairProduct, kLanes, 16, 16, kMayAsk>(g); }
};

}  // namespace rarefy::RAREFY_ISA
