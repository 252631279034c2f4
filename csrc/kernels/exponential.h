// What the functions of single numbers share: constants, choices, and the exponential function.
#pragma once
#include "simd.h"

namespace rarefy::RAREFY_ISA {

RAREFY_INLINE Vec all(float x) { return Vec{} + x; }
RAREFY_INLINE Vec choose(IntVec condition, Vec yes, Vec no) {
  return reinterpret_cast<Vec>((condition & reinterpret_cast<IntVec>(yes)) | (~condition & reinterpret_cast<IntVec>(no)));
}

// For |x| < 88: 2^n * e^r with |r| <= log(2) / 2, e^r by its series. NaN stays NaN.
RAREFY_INLINE Vec exponential(Vec x) {
  constexpr float to_whole = 12582912;  // 1.5 * 2^23: adding it leaves whole numbers in the last bits
  const Vec shifted = x * 1.4426950408889634f + to_whole;
  const Vec whole = shifted - to_whole;
  const Vec rest = (x - whole * 0.693145751953125f) - whole * 1.4286068203094172e-06f;
  Vec sum = rest * (1 / 5040.f) + 1 / 720.f;
  sum = sum * rest + 1 / 120.f;
  sum = sum * rest + 1 / 24.f;
  sum = sum * rest + 1 / 6.f;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.f;
  sum = sum * rest + 1.f;
  const UintVec power = (reinterpret_cast<UintVec>(shifted) + 127u) << 23;
  return sum * reinterpret_cast<Vec>(power);
}

// e^x for x <= 0, and 0 where that is below the normal numbers. NaN stays NaN.
RAREFY_INLINE Vec decay(Vec x) {
#if defined(__AVX512F__) && RAREFY_VECTOR_BYTES == 64
  // Fewer instructions: scaling by a power of two is one, and so is a choice.
  const __m512 given = reinterpret_cast<__m512>(x);
  const __mmask16 kept = _mm512_cmp_ps_mask(given, _mm512_set1_ps(-87), _CMP_NLT_UQ);
  const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(given, _mm512_set1_ps(1.4426950408889634f)),
                                            _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec n = reinterpret_cast<Vec>(whole);
  const Vec rest = (x - n * 0.693145751953125f) - n * 1.4286068203094172e-06f;
  Vec sum = rest * (1 / 5040.f) + 1 / 720.f;
  sum = sum * rest + 1 / 120.f;
  sum = sum * rest + 1 / 24.f;
  sum = sum * rest + 1 / 6.f;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.f;
  sum = sum * rest + 1.f;
  return reinterpret_cast<Vec>(_mm512_maskz_scalef_ps(kept, reinterpret_cast<__m512>(sum), whole));
#else
  const IntVec is_small = x < all(-87);
  return choose(is_small, Vec{}, exponential(choose(is_small, Vec{}, x)));
#endif
}

}  // namespace rarefy::RAREFY_ISA
