// Vectors of 32 float16, tiles of them, and the powers of two by which they are scaled.
//
// A token is scaled so that its largest element lies in [2^3, 2^4), and so is a row of weights: products stay below 2^8,
// and sums of kMostProducts of them below 2^15, which float16 holds. Powers of two change no digit, so that nothing
// overflows, and of a token or row only what is a million times smaller than its largest element loses digits.
#pragma once
#include "simd.h"
#include "tile.h"

namespace rarefy::RAREFY_ISA {

constexpr int kHalves = 32;
constexpr int kMostProducts = 128;
constexpr float kTopExponent = 3;

typedef __m512h Halves;
typedef uint16_t HalfBits;

// A float16 twice, for a broadcast of 32 bits: one of 16 takes a shuffle, and with it a place of a multiply-add.
typedef uint32_t HalfPair;

RAREFY_INLINE Halves load_halves(const HalfBits* p) { return _mm512_load_ph(p); }
RAREFY_INLINE void store_halves(HalfBits* p, Halves v) { _mm512_store_ph(p, v); }
RAREFY_INLINE Halves both(HalfPair value) { return _mm512_castsi512_ph(_mm512_set1_epi32(static_cast<int>(value))); }

RAREFY_INLINE __m512 lower(Halves v) { return _mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_castph_si512(v))); }
RAREFY_INLINE __m512 upper(Halves v) { return _mm512_cvtph_ps(_mm512_extracti64x4_epi64(_mm512_castph_si512(v), 1)); }

// What 2 to the power of must multiply x, so that its largest element reaches kTopExponent; 0 where it has none.
RAREFY_INLINE __m512 shift_of(__m512 largest) {
  const __m512 shift = _mm512_sub_ps(_mm512_set1_ps(kTopExponent), _mm512_getexp_ps(largest));
  return _mm512_mask_mov_ps(shift, _mm512_cmp_ps_mask(largest, _mm512_setzero_ps(), _CMP_EQ_OQ), _mm512_setzero_ps());
}

// ---- rows of activations <-> tiles -----------------------------------------------------------------------------
// Two neighbouring features of a token travel as one word: 16 tokens by 32 features a transposition.

struct Float16 {
  uint16_t bits;
};

RAREFY_INLINE __m512 widened(__m512i words, Float16) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)); }
RAREFY_INLINE __m512 widened(__m512i words, Bfloat16) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
RAREFY_INLINE __m512 widened_upper(__m512i words, Float16 kind) { return widened(_mm512_srli_epi32(words, 16), kind); }
RAREFY_INLINE __m512 widened_upper(__m512i words, Bfloat16) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
RAREFY_INLINE __m256i narrowed(__m512 v, Float16) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
RAREFY_INLINE __m256i narrowed(__m512 v, Bfloat16) { return (__m256i)_mm512_cvtneps_pbh(v); }

RAREFY_INLINE __m512i words_of(const void* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
RAREFY_INLINE __mmask32 first_of(int count) {
  return count >= kHalves ? ~__mmask32{0} : (__mmask32{1} << max_of(count, 0)) - 1;
}

// Largest absolute value of each token, as a float; an infinity or a NaN ranks above all numbers.
template <class Element>
RAREFY_INLINE void largest_of_tokens(const Element* source, int64_t stride, int tokens, int columns, float* largest) {
  const __m512i no_sign = _mm512_set1_epi16(0x7fff);
  for (int t = 0; t < tokens; t++) {
    const Element* p = source + t * stride;
    __m512i most = _mm512_setzero_si512(), more = most;
    int c = 0;
    for (; c + 2 * kHalves <= columns; c += 2 * kHalves) {
      most = _mm512_max_epu16(most, _mm512_and_si512(no_sign, _mm512_loadu_si512(p + c)));
      more = _mm512_max_epu16(more, _mm512_and_si512(no_sign, _mm512_loadu_si512(p + c + kHalves)));
    }
    for (; c < columns; c += kHalves)
      most = _mm512_max_epu16(most, _mm512_and_si512(no_sign, _mm512_maskz_loadu_epi16(first_of(columns - c), p + c)));
    most = _mm512_max_epu16(most, more);
    const __m512i words = _mm512_max_epu32(_mm512_srli_epi32(most, 16), _mm512_and_si512(most, _mm512_set1_epi32(0xffff)));
    const __m512i found = _mm512_set1_epi32(static_cast<int>(_mm512_reduce_max_epu32(words)));
    largest[t] = _mm512_cvtss_f32(widened(found, Element{}));
  }
}

// Whether `size` values, a multiple of kLanes, are all finite.
RAREFY_INLINE bool all_finite(const float* values, int size) {
  bool finite = true;
  for (int i = 0; i < size; i += kLanes)
    finite &= !_mm512_fpclass_ps_mask(_mm512_load_ps(values + i), 0x99);  // NaN of both kinds, infinities of both signs
  return finite;
}

// source [tokens, columns] -> tile [columns][NV * kHalves], each token times 2^shift; missing tokens become 0.
template <int NV, class Element>
void pack(const Element* source, int64_t stride, int tokens, int columns, const float* shifts, HalfBits* tile) {
  constexpr int T = NV * kHalves;
  for (int t = 0; t < T; t += kLanes) {
    const int present = min_of(kLanes, max_of(0, tokens - t));
    const __m512 shift = _mm512_load_ps(shifts + t);
    for (int c = 0; c < columns; c += kHalves) {
      const __mmask32 mask = first_of(columns - c);
      const Element* p = source + t * stride + c;
      Vec r[kLanes];
      if (present == kLanes && columns - c >= kHalves) {
        ask_ahead<false>(p, stride);
        RAREFY_UNROLL for (int i = 0; i < kLanes; i++) r[i] = reinterpret_cast<Vec>(_mm512_loadu_si512(p + i * stride));
      } else {
        for (int i = 0; i < kLanes; i++)
          r[i] = i < present ? reinterpret_cast<Vec>(_mm512_maskz_loadu_epi16(mask, p + i * stride)) : Vec{};
      }
      transpose(r);
      HalfBits* target = tile + static_cast<size_t>(c) * T + t;
      const auto put = [&](int i) {
        const __m512i words = reinterpret_cast<__m512i>(r[i]);
        const auto half = [&](__m512 v) { return _mm512_cvtps_ph(_mm512_scalef_ps(v, shift), _MM_FROUND_TO_NEAREST_INT); };
        _mm256_store_si256(reinterpret_cast<__m256i*>(target + 2 * i * T), half(widened(words, Element{})));
        if (c + 2 * i + 1 < columns)
          _mm256_store_si256(reinterpret_cast<__m256i*>(target + (2 * i + 1) * T), half(widened_upper(words, Element{})));
      };
      if (columns - c >= kHalves) {
        RAREFY_UNROLL for (int i = 0; i < kLanes; i++) put(i);
      } else {
        for (int i = 0; c + 2 * i < columns; i++) put(i);
      }
    }
  }
}

RAREFY_INLINE __m512 load_sums(const HalfBits* p) { return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(p))); }
RAREFY_INLINE __m512 load_sums(const float* p) { return _mm512_load_ps(p); }

// What unpack makes of the sums of a feature: sums / 2^(shift of the token + shift of the feature) + bias.
struct Features {
  const float* shifts;
  const float* bias;  // or null
};

// The reverse of pack, from sums in float16 or float32, rounded once.
template <int NV, class Sum, class Element>
void unpack(const Sum* tile, int tokens, int columns, const float* token_shifts, const Features& features,
            Element* target, int64_t stride) {
  constexpr int T = NV * kHalves;
  for (int t = 0; t < tokens; t += kLanes) {
    const int present = min_of(kLanes, tokens - t);
    const __m512 shift = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_load_ps(token_shifts + t));
    for (int c = 0; c < columns; c += kHalves) {
      const auto feature = [&](int f) {
        const __m512 power = _mm512_sub_ps(shift, _mm512_set1_ps(features.shifts[f]));
        const __m512 v = _mm512_scalef_ps(load_sums(tile + static_cast<size_t>(f) * T + t), power);
        return features.bias ? _mm512_add_ps(v, _mm512_set1_ps(features.bias[f])) : v;
      };
      const auto word = [&](int f) {
        const __m512 low = feature(f), high = f + 1 < columns ? feature(f + 1) : _mm512_setzero_ps();
        const auto bits = [](__m512 v) { return _mm512_cvtepu16_epi32(narrowed(v, Element{})); };
        return reinterpret_cast<Vec>(_mm512_or_si512(bits(low), _mm512_slli_epi32(bits(high), 16)));
      };
      Vec r[kLanes];
      const __mmask32 mask = first_of(columns - c);
      Element* p = target + t * stride + c;
      if (columns - c >= kHalves && present == kLanes) {
        ask_ahead<true>(p, stride);
        RAREFY_UNROLL for (int i = 0; i < kLanes; i++) r[i] = word(c + 2 * i);
        transpose(r);
        RAREFY_UNROLL for (int i = 0; i < kLanes; i++) _mm512_storeu_si512(p + i * stride, reinterpret_cast<__m512i>(r[i]));
      } else {
        for (int i = 0; i < kLanes; i++) r[i] = c + 2 * i < columns ? word(c + 2 * i) : Vec{};
        transpose(r);
        for (int i = 0; i < present; i++) _mm512_mask_storeu_epi16(p + i * stride, mask, reinterpret_cast<__m512i>(r[i]));
      }
    }
  }
}

// The largest element of each of T tokens and the power of two by which it is scaled; false where one is not finite.
template <int T, class Element>
RAREFY_INLINE bool shift_tokens(const Element* source, int columns, int tokens, float* largest, float* shifts) {
  memset(largest, 0, T * sizeof(float));
  largest_of_tokens(source, columns, tokens, columns, largest);
  for (int t = 0; t < T; t += kLanes) _mm512_store_ps(shifts + t, shift_of(_mm512_load_ps(largest + t)));
  return all_finite(largest, T);
}

// total (+)= sum, in float32.
template <int NV>
RAREFY_INLINE void add_to_total(const Halves (&sum)[NV], float* total, bool begins) {
  RAREFY_UNROLL for (int k = 0; k < NV; k++) {
    float* p = total + k * kHalves;
    const __m512 low = lower(sum[k]), high = upper(sum[k]);
    _mm512_store_ps(p, begins ? low : _mm512_add_ps(low, _mm512_load_ps(p)));
    _mm512_store_ps(p + kLanes, begins ? high : _mm512_add_ps(high, _mm512_load_ps(p + kLanes)));
  }
}

}  // namespace rarefy::RAREFY_ISA
