// One head of attention as tiles of the matrix unit: how rows of bfloat16 become operands, and products of them.
//
// A tile has 16 rows of 64 bytes. What is multiplied from the left has 32 neighbouring entries of a row in each of its
// rows; what is multiplied from the right has pairs of them, 16 columns side by side.
#pragma once
#include "attention.h"
#include "blocks_tiles.h"

namespace rarefy::RAREFY_ISA {

static_assert(kLanes == 16, "these kernels are compiled for 512-bit vectors");

constexpr int kTile = 512;  // elements
constexpr int kSide = 32;   // of the squares that one product computes: two tiles each way

// Positions and head size, and both filled up with zeros to whole squares.
struct HeadShape {
  int length, size, room, width;

  explicit HeadShape(const AttentionShape& s)
      : length(s.length), size(s.size), room(up(s.length)), width(up(s.size)) {}
  static int up(int n) { return (n + kSide - 1) / kSide * kSide; }
  size_t cells() const { return static_cast<size_t>(room) * width; }
  int across() const { return width / 16; }  // tiles of 16 features
  int deep() const { return width / 32; }    // tiles of 32 features
};

RAREFY_INLINE const Bfloat16* head_of(const Heads& h, int64_t sample, int head) {
  return static_cast<const Bfloat16*>(h.data) + sample * h.sample + head * h.head;
}

// source [length, size] -> rows [room][width]
RAREFY_INLINE void copy_rows(const Bfloat16* source, int64_t stride, const HeadShape& s, Bfloat16* rows) {
  for (int t = 0; t < s.room; t++) {
    Bfloat16* row = rows + static_cast<size_t>(t) * s.width;
    const int present = t < s.length ? s.size : 0;
    if (present) memcpy(row, source + t * stride, present * sizeof(Bfloat16));
    memset(row + present, 0, (s.width - present) * sizeof(Bfloat16));
  }
}

// rows -> [room / 16][deep] tiles, to be multiplied from the right over the features.
RAREFY_INLINE void pair_features(const Bfloat16* rows, const HeadShape& s, Bfloat16* tiles) {
  for (int t = 0; t < s.room; t += kLanes)
    for (int d = 0; d < s.width; d += kSide, tiles += kTile) {
      Vec square[kLanes];
      RAREFY_UNROLL for (int i = 0; i < kLanes; i++)
        square[i] = *reinterpret_cast<const UnalignedVec*>(rows + static_cast<size_t>(t + i) * s.width + d);
      transpose(square);
      RAREFY_UNROLL for (int i = 0; i < kLanes; i++) *reinterpret_cast<UnalignedVec*>(tiles + i * kSide) = square[i];
    }
}

RAREFY_INLINE Vec pair_of(const Bfloat16* even, const Bfloat16* odd) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
  return reinterpret_cast<Vec>(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

// rows -> [room / 32][across] tiles, to be multiplied from the right over the positions; `kTransposed`: from the left,
// where features are the rows.
template <bool kTransposed>
void pair_positions(const Bfloat16* rows, const HeadShape& s, Bfloat16* tiles) {
  for (int t = 0; t < s.room; t += kSide)
    for (int d = 0; d < s.width; d += kLanes, tiles += kTile) {
      Vec square[kLanes];
      RAREFY_UNROLL for (int i = 0; i < kLanes; i++) {
        const Bfloat16* even = rows + static_cast<size_t>(t + 2 * i) * s.width + d;
        square[i] = pair_of(even, even + s.width);
      }
      if (kTransposed) transpose(square);
      RAREFY_UNROLL for (int i = 0; i < kLanes; i++) *reinterpret_cast<UnalignedVec*>(tiles + i * kSide) = square[i];
    }
}

// 32 rows and 32 columns of a product over `depth` tiles.
struct Square {
  const Bfloat16* upper;  // left operand: 16 rows `row_bytes` apart, and 16 more
  const Bfloat16* lower;
  int64_t row_bytes;
  int64_t left_step;
  const Bfloat16* first;  // right operand: 16 columns, and 16 more
  const Bfloat16* second;
  int64_t right_step;
  int depth;
};

// sums [32][32], with rows `stride` floats apart, = the product; `kAdds`: are added to.
template <bool kAdds>
void multiply(const Square& s, float* sums, int64_t stride) {
  const int64_t bytes = stride * 4, row_bytes = s.row_bytes;
  float* below = sums + 16 * stride;
  if (kAdds) {
    RAREFY_TILE_LOAD(0, sums, bytes);
    RAREFY_TILE_LOAD(1, sums + 16, bytes);
    RAREFY_TILE_LOAD(2, below, bytes);
    RAREFY_TILE_LOAD(3, below + 16, bytes);
  } else {
    RAREFY_TILE_ZERO(0);
    RAREFY_TILE_ZERO(1);
    RAREFY_TILE_ZERO(2);
    RAREFY_TILE_ZERO(3);
  }
  const Bfloat16 *upper = s.upper, *lower = s.lower, *first = s.first, *second = s.second;
  for (int i = s.depth; i > 0; i--) {
    RAREFY_TILE_LOAD(4, upper, row_bytes);
    RAREFY_TILE_LOAD(6, first, 64);
    RAREFY_TILE_LOAD(7, second, 64);
    RAREFY_TILE_LOAD(5, lower, row_bytes);
    RAREFY_TILE_MULTIPLY(0, 4, 6);
    RAREFY_TILE_MULTIPLY(1, 4, 7);
    RAREFY_TILE_MULTIPLY(2, 5, 6);
    RAREFY_TILE_MULTIPLY(3, 5, 7);
    upper += s.left_step;
    lower += s.left_step;
    first += s.right_step;
    second += s.right_step;
  }
  RAREFY_TILE_STORE(0, sums, bytes);
  RAREFY_TILE_STORE(1, sums + 16, bytes);
  RAREFY_TILE_STORE(2, below, bytes);
  RAREFY_TILE_STORE(3, below + 16, bytes);
}

// 2^x for x <= 0 or so, with an error of 3e-6; NaN stays NaN.
RAREFY_INLINE __m512 power_of_two(__m512 x) {
  // The second operand is what a comparison with NaN returns.
  const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-126), x);
  const __m512 whole = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(bounded, whole);
  __m512 sum = _mm512_set1_ps(0.0013333558f);
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.0096181291f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.0555041087f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.2402265070f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.6931471806f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(sum, whole);
}

// score · factor - offset, with a product that is rounded as `factor` times the largest score was: where they are the same, the
// difference is 0, however large they are. Of an ordinary product and the difference the compiler would make one instruction,
// which does not round between them.
RAREFY_INLINE __m512 exponent(__m512 score, __m512 factor, __m512 offset) {
  const __m512 product = _mm512_mul_round_ps(score, factor, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_sub_ps(product, offset);
}

// 32 neighbours as bfloat16.
RAREFY_INLINE __m512i narrow(__m512 low, __m512 high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)); }

// The first `count` of 16 as bfloat16.
RAREFY_INLINE void store_some(Bfloat16* p, __m512 v, int count) {
  const auto mask = static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1);
  _mm256_mask_storeu_epi16(p, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
}

// Parts of one thread's memory, one after the other.
class Scratch {
 public:
  explicit Scratch(char* begin) : next_(begin) {}
  template <class T>
  T* take(size_t count) {
    T* part = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + 63) / 64 * 64;
    return part;
  }
  // Of nothing: how many bytes a row of takes needs.
  size_t taken() const { return reinterpret_cast<size_t>(next_); }

 private:
  char* next_;
};

}  // namespace rarefy::RAREFY_ISA
