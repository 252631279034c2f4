// Of all masks that a small tile can have, the one with the highest sum of scores; vectors run along the tiles.
#pragma once
#include "kernels.h"
#include "simd.h"
#include "tiles.h"

namespace rarefy::RAREFY_ISA {

constexpr int kMostPlaces = 16;
constexpr int kMostOptions = 90;  // two of four
constexpr int kTiles = RAREFY_VECTOR_BYTES / 8;

typedef double Doubles __attribute__((vector_size(RAREFY_VECTOR_BYTES)));
typedef int64_t Longs __attribute__((vector_size(RAREFY_VECTOR_BYTES)));

// The places that each option keeps.
struct Options {
  int number;
  int kept;  // of each
  uint8_t places[kMostOptions][kMostPlaces];
};

// Scores of as many tiles as a vector holds. Infinite ones outrank every sum, so they are counted apart: one +∞
// outweighs all that a tile can have of -∞, as one NaN does.
struct Batch {
  Doubles finite[kMostPlaces];
  Doubles ranks[kMostPlaces];
  bool has_ranks;
};

// The best option of each tile, and where another is as good.
struct Choice {
  Doubles rank, total;
  Longs option, tied;
};

RAREFY_INLINE Options options_of(const KeepRegularCall& c) {
  const int size = c.side * c.side;
  Options made{.number = c.option_count, .kept = c.side * c.count, .places = {}};
  for (int o = 0; o < c.option_count; o++)
    for (int i = 0, k = 0; i < size; i++)
      if (c.options[o * size + i]) made.places[o][k++] = static_cast<uint8_t>(i);
  return made;
}

RAREFY_INLINE double rank_of(float score, int size) {
  if (score != score) return -(size + 1.0);
  return score > 0 ? (size + 1.0) * (size + 1.0) : -1.0;
}

RAREFY_INLINE bool is_finite(float score) { return score - score == 0; }

// Tiles from the first one on, as many as are wanted; the rest of the vector repeats the last.
RAREFY_INLINE void load_batch(const KeepRegularCall& c, int64_t first, int wanted, Batch& batch) {
  const int size = c.side * c.side;
  float scores[kTiles][kMostPlaces];
  batch.has_ranks = false;
  for (int t = 0; t < kTiles; t++) {
    load_tile(c, first + min_of(t, wanted - 1), scores[t]);
    for (int i = 0; i < size; i++) {
      const bool finite = is_finite(scores[t][i]);
      batch.finite[i][t] = finite ? static_cast<double>(scores[t][i]) : 0;
      batch.has_ranks |= !finite;
    }
  }
  if (!batch.has_ranks) return;
  for (int t = 0; t < kTiles; t++)
    for (int i = 0; i < size; i++) batch.ranks[i][t] = is_finite(scores[t][i]) ? 0 : rank_of(scores[t][i], size);
}

RAREFY_INLINE Doubles sum_of(const Doubles* numbers, const uint8_t* places, int kept) {
  Doubles sum = numbers[places[0]];
  for (int k = 1; k < kept; k++) sum += numbers[places[k]];
  return sum;
}

RAREFY_INLINE Longs where(Longs condition, Longs yes, Longs no) { return (condition & yes) | (~condition & no); }
RAREFY_INLINE Doubles where(Longs condition, Doubles yes, Doubles no) {
  return reinterpret_cast<Doubles>(where(condition, reinterpret_cast<Longs>(yes), reinterpret_cast<Longs>(no)));
}

template <bool kHasRanks>
RAREFY_INLINE Choice choose(const Options& options, const Batch& batch) {
  const Doubles zero = {};
  const Longs none = {};
  Choice best{.rank = zero - __builtin_inf(), .total = zero - __builtin_inf(), .option = none, .tied = none};
  for (int o = 0; o < options.number; o++) {
    const Doubles total = sum_of(batch.finite, options.places[o], options.kept);
    const Doubles rank = kHasRanks ? sum_of(batch.ranks, options.places[o], options.kept) : zero;
    Longs better = total > best.total;
    Longs same = total == best.total;
    if (kHasRanks) {
      const Longs level = rank == best.rank;
      better = (better & level) | (rank > best.rank);
      same &= level;
      best.rank = where(better, rank, best.rank);
    }
    best.tied = where(better, none, best.tied | same);
    best.total = where(better, total, best.total);
    best.option = where(better, none + o, best.option);
  }
  return best;
}

// Among options that are as good, the lowest keys win; their sum is another number for each.
RAREFY_INLINE int settled(const KeepRegularCall& c, const Options& options, const Batch& batch, const Choice& best,
                          int lane, int64_t tile) {
  const int64_t first = tile * c.side * c.side;
  double keys[kMostPlaces];
  for (int i = 0; i < c.side * c.side; i++) keys[i] = -static_cast<double>(tie_key(c, first + i));
  double highest = -__builtin_inf();
  int option = 0;
  for (int o = 0; o < options.number; o++) {
    double total = 0, rank = 0, sum = 0;  // added up in the order of places, as everywhere
    for (int k = 0; k < options.kept; k++) {
      const int place = options.places[o][k];
      total += batch.finite[place][lane];
      rank += batch.has_ranks ? batch.ranks[place][lane] : 0;
      sum += keys[place];
    }
    if (total != best.total[lane] || (batch.has_ranks && rank != best.rank[lane]) || sum <= highest) continue;
    highest = sum;
    option = o;
  }
  return option;
}

RAREFY_INLINE void keep_best_of(const KeepRegularCall& c, const Options& options, int64_t first, int wanted) {
  Batch batch;
  load_batch(c, first, wanted, batch);
  const Choice best = batch.has_ranks ? choose<true>(options, batch) : choose<false>(options, batch);
  for (int t = 0; t < wanted; t++) {
    const int option =
        best.tied[t] ? settled(c, options, batch, best, t, first + t) : static_cast<int>(best.option[t]);
    store_tile(c, first + t, c.options + option * c.side * c.side);
  }
}

RAREFY_INLINE bool keep_best(const KeepRegularCall& c) {
  const Options options = options_of(c);
  const int64_t tiles = c.rows / c.side * (c.columns / c.side);
  const int64_t batches = (tiles + kTiles - 1) / kTiles;
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (int64_t b = 0; b < batches; b++)
    keep_best_of(c, options, b * kTiles, static_cast<int>(min_of(int64_t{kTiles}, tiles - b * kTiles)));
  return true;
}

}  // namespace rarefy::RAREFY_ISA
