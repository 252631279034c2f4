// One row of Wᵀ in the backward pass with tiles in float16.
#pragma once
#include "half_vectors.h"

namespace rarefy::RAREFY_ISA {

RAREFY_INLINE Vec as_words(Halves v) { return reinterpret_cast<Vec>(v); }
RAREFY_INLINE Halves add_halves(Vec a, Vec b) { return _mm512_add_ph(reinterpret_cast<__m512h>(a), reinterpret_cast<__m512h>(b)); }

// The first two steps of a sum over lanes (simd.h), where a lane is a pair of neighbouring tokens.
RAREFY_INLINE Vec fold_halves(Halves x, Halves y) {
  const Vec a = as_words(x), b = as_words(y);
  return as_words(add_halves(blend_pairs(a, b), RAREFY_SHUFFLE(a, b, 2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29)));
}
RAREFY_INLINE Vec fold_half_pairs(Vec x, Vec y) {
  return as_words(add_halves(RAREFY_SHUFFLE(x, y, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30),
                             RAREFY_SHUFFLE(x, y, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31)));
}
// The last one: two more additions in float16, the last in float32.
RAREFY_INLINE __m128 half_sums(Vec folded) {
  const __m512i all = reinterpret_cast<__m512i>(folded);
  const __m256h four = _mm256_add_ph(_mm256_castsi256_ph(_mm512_castsi512_si256(all)),
                                     _mm256_castsi256_ph(_mm512_extracti64x4_epi64(all, 1)));
  const __m256i pair = _mm256_castph_si256(four);
  const __m128h two = _mm_add_ph(_mm_castsi128_ph(_mm256_castsi256_si128(pair)),
                                 _mm_castsi128_ph(_mm256_extracti128_si256(pair, 1)));
  const __m256 wide = _mm256_cvtph_ps(_mm_castph_si128(two));
  const __m128 first = _mm256_castps256_ps128(wide), second = _mm256_extractf128_ps(wide, 1);
  return _mm_add_ps(_mm_shuffle_ps(first, second, 0x88), _mm_shuffle_ps(first, second, 0xdd));
}

// As in backward.cpp, the sums over lanes of four connections are taken while the next four are multiplied.
template <int NV, bool kGradX, bool kGradValues>
struct HalfRow {
  const uint16_t* offsets;
  const HalfPair* pairs;
  const HalfBits* grad_panel;
  float* value_sums;
  __m128 power;  // by 2 to which the sums are multiplied
  Halves x[NV], grad_x[NV];
  Vec first_pair, second_pair;

  // dL/dx of this row += value · dL/dy; returns x · dL/dy, still spread over the lanes.
  __attribute__((always_inline)) Halves nonzero(int64_t q, size_t offset) {
    const HalfBits* grad = grad_panel + offset * (NV * kHalves);
    const Halves value = kGradX ? both(pairs[q]) : _mm512_setzero_ph();
    Halves product = _mm512_setzero_ph();
    RAREFY_UNROLL for (int k = 0; k < NV; k++) {
      Halves g = load_halves(grad + k * kHalves);
      __asm__("" : "+v"(g));  // once, into a register: see backward.cpp
      if (kGradX) grad_x[k] = _mm512_fmadd_ph(value, g, grad_x[k]);
      if (kGradValues) product = k == 0 ? _mm512_mul_ph(x[0], g) : _mm512_fmadd_ph(x[k], g, product);
    }
    return product;
  }

  __attribute__((always_inline)) void add_sums(int64_t q, Vec folded) {
    const __m128 sums = _mm_scalef_ps(half_sums(folded), power);
    _mm_storeu_ps(value_sums + q, _mm_add_ps(_mm_loadu_ps(value_sums + q), sums));
  }

  // Connections q to q + 3, and the sums of the four before them.
  template <bool kSums>
  __attribute__((always_inline)) void four(int64_t q) {
    const FourOffsets offset(offsets + q);
    Vec folded{};
    const Halves a = nonzero(q, offset.get<0>());
    if (kSums) folded = fold_half_pairs(first_pair, second_pair);
    const Halves b = nonzero(q + 1, offset.get<1>());
    if (kSums) add_sums(q - 4, folded);
    const Halves c = nonzero(q + 2, offset.get<2>());
    if (kGradValues) first_pair = fold_halves(a, b);
    const Halves d = nonzero(q + 3, offset.get<3>());
    if (kGradValues) second_pair = fold_halves(c, d);
  }

  __attribute__((always_inline)) void run(int64_t q, int64_t end) {
    if (q + 4 <= end) {
      four<false>(q);
      for (q += 4; q + 4 <= end; q += 4) four<kGradValues>(q);
      if (kGradValues) add_sums(q - 4, fold_half_pairs(first_pair, second_pair));
    }
    for (; q < end; q++) {
      const Halves a = nonzero(q, offsets[q]);
      if (kGradValues) {
        const Vec none{};
        const __m128 sum = _mm_scalef_ss(half_sums(fold_half_pairs(fold_halves(a, _mm512_setzero_ph()), none)), power);
        value_sums[q] += _mm_cvtss_f32(sum);
      }
    }
  }
};

}  // namespace rarefy::RAREFY_ISA
