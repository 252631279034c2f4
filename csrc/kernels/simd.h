// Vectors of the instruction set that this file is compiled for: GCC/Clang vector extensions, and the intrinsics that
// measurements ask for, each with its reason.
//
// Everything lives in a namespace named after the instruction set, and nothing here or in the files that include
// this uses a standard-library template: the linker would keep one copy of it for all instruction sets.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef RAREFY_ISA
#error "compile with -DRAREFY_ISA=<name of the instruction set>"
#endif

#if defined(RAREFY_VECTOR_BYTES)  // a test build may ask for longer vectors than its target has
#elif defined(__AVX512F__)
#define RAREFY_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define RAREFY_VECTOR_BYTES 32
#else
#define RAREFY_VECTOR_BYTES 16
#endif

#define RAREFY_INLINE static inline __attribute__((always_inline))
#define RAREFY_UNROLL _Pragma("GCC unroll 16")

namespace rarefy::RAREFY_ISA {

constexpr int kLanes = RAREFY_VECTOR_BYTES / 4;

typedef float Vec __attribute__((vector_size(RAREFY_VECTOR_BYTES), may_alias));
typedef float UnalignedVec __attribute__((vector_size(RAREFY_VECTOR_BYTES), may_alias, aligned(4)));
typedef uint32_t UintVec __attribute__((vector_size(RAREFY_VECTOR_BYTES), may_alias));
typedef int32_t IntVec __attribute__((vector_size(RAREFY_VECTOR_BYTES), may_alias));
typedef uint16_t HalfVec __attribute__((vector_size(RAREFY_VECTOR_BYTES / 2), may_alias, aligned(2)));
typedef uint8_t ByteVec __attribute__((vector_size(RAREFY_VECTOR_BYTES / 4), may_alias, aligned(1)));
typedef float Vec4 __attribute__((vector_size(16), may_alias));
typedef float UnalignedVec4 __attribute__((vector_size(16), may_alias, aligned(4)));

struct Bfloat16 {
  uint16_t bits;
};

RAREFY_INLINE int min_of(int a, int b) { return b < a ? b : a; }
RAREFY_INLINE int max_of(int a, int b) { return a < b ? b : a; }
RAREFY_INLINE int64_t min_of(int64_t a, int64_t b) { return b < a ? b : a; }
RAREFY_INLINE int64_t max_of(int64_t a, int64_t b) { return a < b ? b : a; }

// ---- loads and stores with conversion ------------------------------------------------------------------------

RAREFY_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
RAREFY_INLINE Vec load(const Bfloat16* p) {
  const UintVec wide = __builtin_convertvector(*reinterpret_cast<const HalfVec*>(p), UintVec);
  return reinterpret_cast<Vec>(wide << 16);
}
RAREFY_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
RAREFY_INLINE void store(Bfloat16* p, Vec v) {  // rounds to nearest even; a NaN stays a (quiet) NaN
  const UintVec bits = reinterpret_cast<UintVec>(v);
  const UintVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UintVec is_nan = reinterpret_cast<UintVec>(v != v);
  const UintVec result = (rounded & ~is_nan) | (((bits >> 16) | 0x40u) & is_nan);
  *reinterpret_cast<HalfVec*>(p) = __builtin_convertvector(result, HalfVec);
}

RAREFY_INLINE float to_float(float x) { return x; }
RAREFY_INLINE float to_float(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
RAREFY_INLINE void from_float(float f, float* p) { *p = f; }
RAREFY_INLINE void from_float(float f, Bfloat16* p) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  p->bits = static_cast<uint16_t>(f != f ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// ---- four values at a time -----------------------------------------------------------------------------------
// Loads bind the kernels where vectors are short: four values and four offsets come with one load each. With AVX2 the
// intrinsic doubles the four values while it loads them; from a shuffle GCC makes an instruction of its own, which
// takes a cycle from the multiply-adds (6% of the forward pass).

struct FourValues {
#if RAREFY_VECTOR_BYTES == 64
  const float* p;
  explicit FourValues(const float* values) : p(values) {}
  template <int i>
  __attribute__((always_inline)) float get() const {
    return p[i];
  }
#elif RAREFY_VECTOR_BYTES == 32
  Vec twice;
  explicit FourValues(const float* values) {
    twice = reinterpret_cast<Vec>(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(values)));
  }
  template <int i>
  __attribute__((always_inline)) Vec get() const {
    return __builtin_shufflevector(twice, twice, i, i, i, i, i + 4, i + 4, i + 4, i + 4);
  }
#else
  Vec four;
  explicit FourValues(const float* values) : four(load(values)) {}
  template <int i>
  __attribute__((always_inline)) Vec get() const {
    return __builtin_shufflevector(four, four, i, i, i, i);
  }
#endif
};

struct FourOffsets {
  uint64_t word;
  explicit FourOffsets(const uint16_t* offsets) { memcpy(&word, offsets, 8); }
  template <int i>
  __attribute__((always_inline)) size_t get() const {
    return word >> (16 * i) & 0xffff;
  }
};

// ---- transposing kLanes × kLanes floats in registers ---------------------------------------------------------
// First 4 × 4 blocks inside each 128-bit lane (interleave words, then pairs of words), then whole lanes.

#define RAREFY_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#if RAREFY_VECTOR_BYTES == 64
#define RAREFY_WORDS_LOW(a, b) RAREFY_SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define RAREFY_WORDS_HIGH(a, b) RAREFY_SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define RAREFY_PAIRS_LOW(a, b) RAREFY_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define RAREFY_PAIRS_HIGH(a, b) RAREFY_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define RAREFY_LANES_EVEN(a, b) RAREFY_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define RAREFY_LANES_ODD(a, b) RAREFY_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
#elif RAREFY_VECTOR_BYTES == 32
#define RAREFY_WORDS_LOW(a, b) RAREFY_SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define RAREFY_WORDS_HIGH(a, b) RAREFY_SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define RAREFY_PAIRS_LOW(a, b) RAREFY_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define RAREFY_PAIRS_HIGH(a, b) RAREFY_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#define RAREFY_LANES_EVEN(a, b) RAREFY_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define RAREFY_LANES_ODD(a, b) RAREFY_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#else
#define RAREFY_WORDS_LOW(a, b) RAREFY_SHUFFLE(a, b, 0, 4, 1, 5)
#define RAREFY_WORDS_HIGH(a, b) RAREFY_SHUFFLE(a, b, 2, 6, 3, 7)
#define RAREFY_PAIRS_LOW(a, b) RAREFY_SHUFFLE(a, b, 0, 1, 4, 5)
#define RAREFY_PAIRS_HIGH(a, b) RAREFY_SHUFFLE(a, b, 2, 3, 6, 7)
#endif

RAREFY_INLINE void transpose(Vec* r) {
  Vec t[kLanes];
  RAREFY_UNROLL for (int i = 0; i < kLanes; i += 2) {
    t[i] = RAREFY_WORDS_LOW(r[i], r[i + 1]);
    t[i + 1] = RAREFY_WORDS_HIGH(r[i], r[i + 1]);
  }
  RAREFY_UNROLL for (int i = 0; i < kLanes; i += 4) {
    r[i] = RAREFY_PAIRS_LOW(t[i], t[i + 2]);
    r[i + 1] = RAREFY_PAIRS_HIGH(t[i], t[i + 2]);
    r[i + 2] = RAREFY_PAIRS_LOW(t[i + 1], t[i + 3]);
    r[i + 3] = RAREFY_PAIRS_HIGH(t[i + 1], t[i + 3]);
  }
#if RAREFY_VECTOR_BYTES == 32
  RAREFY_UNROLL for (int i = 0; i < 4; i++) {
    t[i] = RAREFY_LANES_EVEN(r[i], r[i + 4]);
    t[i + 4] = RAREFY_LANES_ODD(r[i], r[i + 4]);
  }
  RAREFY_UNROLL for (int i = 0; i < 8; i++) r[i] = t[i];
#elif RAREFY_VECTOR_BYTES == 64
  RAREFY_UNROLL for (int half = 0; half < 16; half += 8) {
    RAREFY_UNROLL for (int i = half; i < half + 4; i++) {
      t[i] = RAREFY_LANES_EVEN(r[i], r[i + 4]);
      t[i + 4] = RAREFY_LANES_ODD(r[i], r[i + 4]);
    }
  }
  RAREFY_UNROLL for (int i = 0; i < 4; i++) {
    r[i] = RAREFY_LANES_EVEN(t[i], t[i + 8]);
    r[i + 8] = RAREFY_LANES_ODD(t[i], t[i + 8]);
    r[i + 4] = RAREFY_LANES_EVEN(t[i + 4], t[i + 12]);
    r[i + 12] = RAREFY_LANES_ODD(t[i + 4], t[i + 12]);
  }
#endif
}

// ---- sums over the lanes of four vectors at once -------------------------------------------------------------
// In three steps, so that a caller can put other work between them: `fold` leaves half of the lanes to each of two
// vectors (one blend, one shuffle), `fold_pairs` a quarter to each of four, `lane_sums` adds up the 128-bit lanes.
// The blends are intrinsics because GCC makes shuffles of them, which compete with the multiply-adds for a port.

#if RAREFY_VECTOR_BYTES == 64
RAREFY_INLINE Vec blend_pairs(Vec a, Vec b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_mask_blend_ps(0xcccc, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#else
  return RAREFY_SHUFFLE(a, b, 0, 1, 18, 19, 4, 5, 22, 23, 8, 9, 26, 27, 12, 13, 30, 31);
#endif
}
RAREFY_INLINE Vec fold(Vec a, Vec b) {
  return blend_pairs(a, b) + RAREFY_SHUFFLE(a, b, 2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29);
}
RAREFY_INLINE Vec fold_pairs(Vec x, Vec y) {
  return RAREFY_SHUFFLE(x, y, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
         RAREFY_SHUFFLE(x, y, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}
RAREFY_INLINE Vec4 lane_sums(Vec s) {
  const auto h = RAREFY_SHUFFLE(s, s, 0, 1, 2, 3, 4, 5, 6, 7) + RAREFY_SHUFFLE(s, s, 8, 9, 10, 11, 12, 13, 14, 15);
  return RAREFY_SHUFFLE(h, h, 0, 1, 2, 3) + RAREFY_SHUFFLE(h, h, 4, 5, 6, 7);
}
#elif RAREFY_VECTOR_BYTES == 32
RAREFY_INLINE Vec fold(Vec a, Vec b) {
  const __m256 blend = _mm256_blend_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), 0xcc);
  return reinterpret_cast<Vec>(blend) + RAREFY_SHUFFLE(a, b, 2, 3, 8, 9, 6, 7, 12, 13);
}
RAREFY_INLINE Vec fold_pairs(Vec x, Vec y) {
  return RAREFY_SHUFFLE(x, y, 0, 2, 8, 10, 4, 6, 12, 14) + RAREFY_SHUFFLE(x, y, 1, 3, 9, 11, 5, 7, 13, 15);
}
RAREFY_INLINE Vec4 lane_sums(Vec s) { return RAREFY_SHUFFLE(s, s, 0, 1, 2, 3) + RAREFY_SHUFFLE(s, s, 4, 5, 6, 7); }
#else
RAREFY_INLINE Vec fold(Vec a, Vec b) { return RAREFY_SHUFFLE(a, b, 0, 1, 6, 7) + RAREFY_SHUFFLE(a, b, 2, 3, 4, 5); }
RAREFY_INLINE Vec fold_pairs(Vec x, Vec y) { return RAREFY_SHUFFLE(x, y, 0, 2, 4, 6) + RAREFY_SHUFFLE(x, y, 1, 3, 5, 7); }
RAREFY_INLINE Vec4 lane_sums(Vec s) { return s; }
#endif

RAREFY_INLINE float lane_sum(Vec v) {
#if RAREFY_VECTOR_BYTES == 64
  const auto h = RAREFY_SHUFFLE(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + RAREFY_SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const Vec4 four = RAREFY_SHUFFLE(h, h, 0, 1, 2, 3) + RAREFY_SHUFFLE(h, h, 4, 5, 6, 7);
#elif RAREFY_VECTOR_BYTES == 32
  const Vec4 four = RAREFY_SHUFFLE(v, v, 0, 1, 2, 3) + RAREFY_SHUFFLE(v, v, 4, 5, 6, 7);
#else
  const Vec4 four = v;
#endif
  const Vec4 two = four + RAREFY_SHUFFLE(four, four, 2, 3, 2, 3);
  return two[0] + two[1];
}

}  // namespace rarefy::RAREFY_ISA
