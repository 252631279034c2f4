// Tiles: a block of tokens, transposed so that each feature is one contiguous run of NV * kLanes floats.
#pragma once
#include "simd.h"

namespace rarefy::RAREFY_ISA {

// Vectors per token tile. The backward pass keeps twice as many operands in registers, so that instruction sets with
// 16 registers take fewer there.
#if RAREFY_VECTOR_BYTES == 64
constexpr int kForwardVectors = 4, kBackwardVectors = 4;
#elif RAREFY_VECTOR_BYTES == 32
constexpr int kForwardVectors = 8, kBackwardVectors = 4;
#else
constexpr int kForwardVectors = 8, kBackwardVectors = 8;
#endif

// Of the forward pass where many connections are active. Longer tiles halve what a connection takes besides its
// products, but panels outgrow the first-level cache: at 80% sparsity that saves a seventh of the pass with 512-bit
// vectors, at 90% it costs 5% (Zen 5).
constexpr int kLongForwardVectors = 8;

// Of the backward pass on Intel's processors, where many connections are active and where few are: lanes are summed less often.
#if RAREFY_VECTOR_BYTES == 64
constexpr int kLongBackwardVectors = 8, kMiddleBackwardVectors = 6;
#else
constexpr int kLongBackwardVectors = kBackwardVectors, kMiddleBackwardVectors = kBackwardVectors;
#endif

// Whether choices hold that were measured on Intel's processors with AVX-512: 2 MB of second-level cache, and misses of
// the third that take it long. RAREFY_AS_INTEL takes them anywhere, for tests.
RAREFY_INLINE bool on_intel() {
#if defined(RAREFY_AS_INTEL)
  return true;
#elif defined(__AVX512F__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// Accumulator tiles of one block of rows stay in the second-level cache.
RAREFY_INLINE size_t accumulator_bytes() { return (on_intel() ? 640 : 256) * size_t{1024}; }

RAREFY_INLINE int round_up(int n, int step) { return (n + step - 1) / step * step; }

// Rows per block: about equal blocks, a multiple of kLanes.
RAREFY_INLINE int rows_per_block(int rows, int tile, int arrays) {
  const int fitting = static_cast<int>(accumulator_bytes() / (static_cast<size_t>(arrays) * tile * 4)) / kLanes * kLanes;
  const int wanted = max_of(kLanes, fitting);
  const int blocks = max_of(1, (rows + wanted / 2) / wanted);
  return max_of(kLanes, round_up((rows + blocks - 1) / blocks, kLanes));
}

// Floats that hold the accumulators of any block that rows_per_block makes of at most `rows` rows (a block is at most
// 1.5 times the wanted one), and whether one block holds all rows.
RAREFY_INLINE size_t accumulator_floats(int rows, int tile, int arrays) {
  const size_t all = static_cast<size_t>(round_up(rows, kLanes)) * tile;
  const size_t most = accumulator_bytes() / 4 / arrays * 3 / 2 + 2 * static_cast<size_t>(kLanes) * tile;
  return all < most ? all : most;
}
RAREFY_INLINE bool one_block(int rows, int tile, int arrays) { return rows_per_block(rows, tile, arrays) >= rows; }

// Asks for what kLanes rows have `kAheadBytes` after p, which may be beyond their end: nothing is read.
constexpr int kAheadBytes = 256;
template <bool kWrites, class Element>
RAREFY_INLINE void ask_ahead([[maybe_unused]] const Element* p, [[maybe_unused]] int64_t stride) {
#if defined(__AVX512F__)
  RAREFY_UNROLL for (int i = 0; i < kLanes; i++) {
    const char* line = reinterpret_cast<const char*>(p + i * stride) + kAheadBytes;
    if (kWrites)
      __asm__ volatile("prefetchw %0" : : "m"(*line));
    else
      __builtin_prefetch(line);
  }
#endif
}

// Asks for NV vectors from p on.
template <int NV>
RAREFY_INLINE void ask_for(const float* p) {
  RAREFY_UNROLL for (int k = 0; k < NV; k++) __builtin_prefetch(p + k * kLanes);
}

// source [tokens, columns] with rows `stride` apart -> tile [columns][NV * kLanes]; missing tokens become 0.
template <int NV, class Element>
void pack(const Element* source, int64_t stride, int tokens, int columns, float* tile) {
  constexpr int T = NV * kLanes;
  const int whole = columns / kLanes * kLanes;
  const bool ahead = on_intel();
  for (int t = 0; t < T; t += kLanes) {
    const int present = min_of(kLanes, max_of(0, tokens - t));
    for (int c = 0; c < whole; c += kLanes) {
      Vec r[kLanes];
      const Element* p = source + t * stride + c;
      if (present == kLanes) {
        if (ahead) ask_ahead<false>(p, stride);
        RAREFY_UNROLL for (int i = 0; i < kLanes; i++) r[i] = load(p + i * stride);
      } else {
        for (int i = 0; i < kLanes; i++) r[i] = i < present ? load(p + i * stride) : Vec{};
      }
      transpose(r);
      RAREFY_UNROLL for (int i = 0; i < kLanes; i++) store(tile + static_cast<size_t>(c + i) * T + t, r[i]);
    }
  }
  for (int c = whole; c < columns; c++)
    for (int t = 0; t < T; t++) tile[static_cast<size_t>(c) * T + t] = t < tokens ? to_float(source[t * stride + c]) : 0.f;
}

// The reverse. Tokens are the outer loop: writing all rows of the target at once thrashes the first-level cache when
// `stride` is a multiple of a large power of two.
template <int NV, class Element>
void unpack(const float* tile, int tokens, int columns, Element* target, int64_t stride) {
  constexpr int T = NV * kLanes;
  const int whole = columns / kLanes * kLanes;
  const bool ahead = on_intel();
  for (int t = 0; t < tokens; t += kLanes) {
    const int present = min_of(kLanes, tokens - t);
    for (int c = 0; c < whole; c += kLanes) {
      Vec r[kLanes];
      Element* p = target + t * stride + c;
      if (ahead && present == kLanes) ask_ahead<true>(p, stride);
      RAREFY_UNROLL for (int i = 0; i < kLanes; i++) r[i] = load(tile + static_cast<size_t>(c + i) * T + t);
      transpose(r);
      if (present == kLanes) {
        RAREFY_UNROLL for (int i = 0; i < kLanes; i++) store(p + i * stride, r[i]);
      } else {
        for (int i = 0; i < present; i++) store(p + i * stride, r[i]);
      }
    }
  }
  for (int c = whole; c < columns; c++)
    for (int t = 0; t < tokens; t++) from_float(tile[static_cast<size_t>(c) * T + t], target + t * stride + c);
}

template <int NV>
struct VectorCount {
  static constexpr int value = NV;
};

// Calls f with the fewest vectors that hold `tokens`: a ragged last tile costs its share only.
template <int Most, int Lanes = kLanes, class Function>
RAREFY_INLINE void with_vectors(int tokens, Function f) {
  switch ((tokens + Lanes - 1) / Lanes) {
    case 1: return f(VectorCount<1>{});
    case 2: return f(VectorCount<2>{});
    case 3: return f(VectorCount<3>{});
    case 4: return f(VectorCount<4>{});
    case 5:
    case 6: return f(VectorCount<Most < 6 ? Most : 6>{});
    default: return f(VectorCount<Most>{});
  }
}

}  // namespace rarefy::RAREFY_ISA
