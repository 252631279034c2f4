// Products of a lone token where a panel's inputs fit into registers: AVX-512 looks 64 halves of 16 bits up at a time.
#pragma once
#include "simd.h"

namespace rarefy::RAREFY_ISA {

constexpr int kLookedUp = 32;         // connections at a time
constexpr int kMostPairs = 6;         // of registers for each half of the inputs; more do not fit
constexpr int kMostInputs = 64 * kMostPairs;

#if defined(__AVX512BW__) && !defined(__clang__)

typedef uint16_t Short32 __attribute__((vector_size(64), may_alias));
typedef uint16_t UnalignedShort32 __attribute__((vector_size(64), may_alias, aligned(2)));
typedef uint64_t Long8 __attribute__((vector_size(64), may_alias));
typedef float Float16 __attribute__((vector_size(64), may_alias));
typedef float UnalignedFloat16 __attribute__((vector_size(64), may_alias, aligned(4)));

RAREFY_INLINE Short32 load_halves(const void* p) { return *static_cast<const UnalignedShort32*>(p); }

// The inputs of a panel, low and high halves apart.
template <int kPairs>
struct InputTable {
  Short32 low[2 * kPairs], high[2 * kPairs];

  explicit InputTable(const float* x) {
    const Short32 even{0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                       32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    for (int i = 0; i < 2 * kPairs; i++) {
      const Short32 first = load_halves(x + 32 * i), second = load_halves(x + 32 * i + 16);
      low[i] = __builtin_shuffle(first, second, even);
      high[i] = __builtin_shuffle(first, second, even + 1);
    }
  }

  // products[q] = values[q] · x[offsets[q]] for 32 connections.
  inline __attribute__((always_inline)) void multiply(const uint16_t* offsets, const float* values, float* products) const {
    // Halves are interleaved within 16 bytes, so connections are put in the order that this undoes.
    const Long8 loaded = reinterpret_cast<Long8>(load_halves(offsets));
    const Short32 index = reinterpret_cast<Short32>(__builtin_shuffle(loaded, Long8{0, 4, 1, 5, 2, 6, 3, 7}));
    const Short32 page = index >> 6;
    Short32 l = __builtin_shuffle(low[0], low[1], index), h = __builtin_shuffle(high[0], high[1], index);
    RAREFY_UNROLL
    for (int p = 1; p < kPairs; p++) {
      const auto is_here = page == static_cast<uint16_t>(p);
      l = is_here ? __builtin_shuffle(low[2 * p], low[2 * p + 1], index) : l;
      h = is_here ? __builtin_shuffle(high[2 * p], high[2 * p + 1], index) : h;
    }
    const Short32 begin{0,  32, 1,  33, 2,  34, 3,  35, 8,  40, 9,  41, 10, 42, 11, 43,
                        16, 48, 17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59};
    store16(products, values, __builtin_shuffle(l, h, begin));
    store16(products + 16, values + 16, __builtin_shuffle(l, h, begin + 4));
  }

 private:
  inline __attribute__((always_inline)) void store16(float* products, const float* values, Short32 inputs) const {
    *reinterpret_cast<UnalignedFloat16*>(products) =
        reinterpret_cast<Float16>(inputs) * *reinterpret_cast<const UnalignedFloat16*>(values);
  }
};

template <int kPairs>
__attribute__((noinline)) int64_t multiply_by_table(int pairs, const uint16_t* offsets, const float* values,
                                                    int64_t count, int64_t readable, const float* x, float* products) {
  if constexpr (kPairs < kMostPairs)
    if (pairs > kPairs)
      return multiply_by_table<kPairs + 1>(pairs, offsets, values, count, readable, x, products);
  const InputTable<kPairs> table(x);
  int64_t q = 0;
  for (; q < count && q + kLookedUp <= readable; q += kLookedUp)
    table.multiply(offsets + q, values + q, products + q);
  return q;
}

// products[q] = values[q] · x[offsets[q]] for the first connections; how many. Up to 31 more where `readable` allows.
// x: kMostInputs can be read.
RAREFY_INLINE int64_t look_up_and_multiply(int width, const uint16_t* offsets, const float* values, int64_t count,
                                           int64_t readable, const float* x, float* products) {
  if (width > kMostInputs) return 0;
  return multiply_by_table<1>((width + 63) / 64, offsets, values, count, readable, x, products);
}

#else

RAREFY_INLINE int64_t look_up_and_multiply(int, const uint16_t*, const float*, int64_t, int64_t, const float*, float*) {
  return 0;
}

#endif

}  // namespace rarefy::RAREFY_ISA
