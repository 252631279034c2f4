// The values of a matrix in float16, and how many panels are summed up in it before a sum goes to float32.
#pragma once
#include "half_vectors.h"
#include "kernels.h"
#include "partition.h"

namespace rarefy::RAREFY_ISA {

// Floats of scratch for tiles of T float16 of a block of rows, of which `arrays` share the cache; whole cache lines.
RAREFY_INLINE size_t tile_floats(int rows, int tokens, int arrays) {
  return (accumulator_floats(rows, tokens / 2, arrays) + kLanes - 1) / kLanes * kLanes;
}

// Visits [begin, end) of `row` in each panel.
template <class Function>
RAREFY_INLINE void each_panel(const Layout& m, int row, Function f) {
  for (int p = 0, panels = m.count(); p < panels; p++) {
    const int32_t* starts = m.starts + static_cast<int64_t>(p) * m.rows + row;
    f(static_cast<int64_t>(starts[0]), static_cast<int64_t>(starts[1]));
  }
}

// Visits what a range of rows has in each panel.
template <class Function>
RAREFY_INLINE void each_panel_range(const Layout& m, Range rows, Function f) {
  for (int p = 0, panels = m.count(); p < panels; p++) {
    const int32_t* starts = m.starts + static_cast<int64_t>(p) * m.rows;
    f(static_cast<int64_t>(starts[rows.begin]), static_cast<int64_t>(starts[rows.end]));
  }
}

// Values q to q + 15 in the order of m, of which those before `end` count.
RAREFY_INLINE __m512 some_values(const float* values, const int32_t* order, int64_t q, __mmask16 mask) {
  if (!order) return _mm512_maskz_loadu_ps(mask, values + q);
  const __m512i at = _mm512_maskz_loadu_epi32(mask, order + q);
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, at, values, 4);
}

RAREFY_INLINE __mmask16 lanes_before(int64_t q, int64_t end) {
  return end - q >= kLanes ? __mmask16(0xffff) : static_cast<__mmask16>((1u << (end - q)) - 1);
}

// A row of values, scaled by 2^shift; the shift, or NaN where a value is not finite.
RAREFY_INLINE float convert_row(const Layout& m, int row, const float* values, const int32_t* order, HalfPair* pairs) {
  __m512 most = _mm512_setzero_ps();
  const __m512 unknown = _mm512_set1_ps(__builtin_inff());
  each_panel(m, row, [&](int64_t q, int64_t end) {
    for (; q < end; q += kLanes) {
      const __m512 v = _mm512_abs_ps(some_values(values, order, q, lanes_before(q, end)));
      // A NaN as well as an infinity: max alone would pass over it.
      most = _mm512_max_ps(most, _mm512_mask_mov_ps(v, _mm512_fpclass_ps_mask(v, 0x81), unknown));
    }
  });
  const float largest = _mm512_reduce_max_ps(most);
  if (largest == __builtin_inff()) return __builtin_nanf("");
  const __m512 shift = shift_of(_mm512_set1_ps(largest));
  each_panel(m, row, [&](int64_t q, int64_t end) {
    for (; q < end; q += kLanes) {
      const __mmask16 mask = lanes_before(q, end);
      const __m512 v = _mm512_scalef_ps(some_values(values, order, q, mask), shift);
      const __m512i half = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
      _mm512_mask_storeu_epi32(pairs + q, mask, _mm512_or_si512(half, _mm512_slli_epi32(half, 16)));
    }
  });
  return _mm512_cvtss_f32(shift);
}

RAREFY_INLINE int most_products(const Layout& m, int first, int last) {
  int most = 0;
  for (int row = 0; row < m.rows; row++) {
    int count = 0;
    for (int p = first; p < last; p++) {
      const int32_t* starts = m.starts + static_cast<int64_t>(p) * m.rows + row;
      count += starts[1] - starts[0];
    }
    most = max_of(most, count);
  }
  return most;
}

// How many panels are summed up in float16 before the sums go to float32: as many as leave no row with more than
// kMostProducts, or one, whose longer rows are cut. `whole` where all panels go into one sum.
struct Sums {
  int panels;
  bool whole;

  explicit Sums(const Layout& m) : panels(m.count()), whole(most_products(m, 0, m.count()) <= kMostProducts) {
    const int64_t average = m.nonzeros() / max_of(m.rows, 1);
    const int all = m.count();
    for (int parts = static_cast<int>(average / kMostProducts) + 2; !whole && panels > 1; parts++) {
      panels = (all + parts - 1) / parts;
      if (fit(m)) break;
    }
  }
  bool begin(int panel) const { return panel % panels == 0; }

 private:
  bool fit(const Layout& m) const {
    for (int p = 0; p < m.count(); p += panels)
      if (most_products(m, p, min_of(p + panels, m.count())) > kMostProducts) return false;
    return true;
  }
};

}  // namespace rarefy::RAREFY_ISA
