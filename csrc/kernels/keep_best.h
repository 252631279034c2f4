// Of all masks that a small tile can have, the one with the highest sum of scores; vectors run along the tiles.
#pragma once
#include "lanes.h"
#include "tiles.h"

namespace rarefy::RAREFY_ISA {

constexpr int kMostPlaces = 16;
constexpr int kMostOptions = 90;  // two of four

// The places that each option keeps. Neighbours in the list may have the first half of them in common, whose sum is then
// known.
struct Options {
  int number;
  int kept;  // of each
  uint8_t places[kMostOptions][kMostPlaces];
  bool begins_alike[kMostOptions];  // as the one before it
  int64_t refused[kMostOptions];    // bits: the places that it lacks, and 16 above them those that it keeps
};

// Scores of as many tiles as a vector holds. Infinite ones outrank every sum, so they are counted apart: one +∞
// outweighs all that a tile can have of -∞, as one NaN does.
struct Batch {
  Doubles finite[kMostPlaces];
  Doubles ranks[kMostPlaces];  // made where they are needed
  Longs outranking;            // bits: the places of +∞, and 16 above them those of -∞ and NaN
  bool has_infinities;
  float scores[kTiles][kMostPlaces];
};

// The best option of each tile, and where another is as good.
struct Choice {
  bool by_rank;
  Doubles rank, total;
  Longs option, tied;
};

RAREFY_INLINE Options options_of(const KeepRegularCall& c) {
  const int size = c.side * c.side;
  Options made{.number = c.option_count, .kept = c.side * c.count, .places = {}, .begins_alike = {}, .refused = {}};
  for (int o = 0; o < c.option_count; o++) {
    int kept = 0;
    for (int i = 0; i < size; i++) {
      const bool keeps = c.options[o * size + i];
      if (keeps) made.places[o][kept++] = static_cast<uint8_t>(i);
      made.refused[o] |= int64_t{1} << (keeps ? i + 16 : i);
    }
    const size_t half = static_cast<size_t>(kept / 2);
    made.begins_alike[o] = o > 0 && memcmp(made.places[o], made.places[o - 1], half) == 0;
  }
  return made;
}

// Tiles from the first one on, as many as are wanted; the rest of the vector repeats the last.
template <int kSide>
RAREFY_INLINE void load_batch(const KeepRegularCall& c, int64_t first, int wanted, Batch& batch) {
  for (int t = 0; t < kTiles; t++) load_tile(c, first + min_of(t, wanted - 1), kSide, kSide, batch.scores[t]);
  for (int i = 0; i < kSide * kSide; i++)
    for (int t = 0; t < kTiles; t++) batch.finite[i][t] = static_cast<double>(batch.scores[t][i]);
}

// Takes what is not finite out of the sums.
RAREFY_INLINE void set_infinities_apart(Batch& batch, int size) {
  const Longs none = {};
  Longs outranking = {};
  for (int i = 0; i < size; i++) {
    const Doubles score = batch.finite[i];
    const Longs kept = score > 3.5e38, others = ~(score >= -3.5e38);
    outranking |= where(kept, none + (int64_t{1} << i), none) | where(others, none + (int64_t{1} << (i + 16)), none);
    batch.finite[i] = where(kept | others, Doubles{}, score);
  }
  batch.outranking = outranking;
  int64_t found = 0;
  for (int t = 0; t < kTiles; t++) found |= outranking[t];
  batch.has_infinities = found;
}

RAREFY_INLINE double rank_of(float score, int size) {
  if (score - score == 0) return 0;
  if (score != score) return -(size + 1.0);
  return score > 0 ? (size + 1.0) * (size + 1.0) : -1.0;
}

RAREFY_INLINE void fill_ranks(Batch& batch, int size) {
  for (int t = 0; t < kTiles; t++)
    for (int i = 0; i < size; i++) batch.ranks[i][t] = rank_of(batch.scores[t][i], size);
}

RAREFY_INLINE Doubles sum_of(const Doubles* numbers, const uint8_t* places, int kept) {
  Doubles sum = numbers[places[0]];
  for (int k = 1; k < kept; k++) sum += numbers[places[k]];
  return sum;
}

// The option with the highest sum among those that keep every +∞, and nothing else that is not finite; where there is
// none, its sum is -∞.
template <int kKept, bool kHasInfinities>
RAREFY_INLINE Choice choose(const Options& options, const Batch& batch) {
  constexpr int kHalf = kKept / 2;
  const Doubles none = Doubles{} - __builtin_inf();
  Doubles first_half = none, highest = none, second = none;
  Longs option = {};
  for (int o = 0; o < options.number; o++) {
    const uint8_t* places = options.places[o];
    if (!options.begins_alike[o]) first_half = sum_of(batch.finite, places, kHalf);
    Doubles total = first_half;
    RAREFY_UNROLL for (int k = kHalf; k < kKept; k++) total += batch.finite[places[k]];
    if constexpr (kHasInfinities) total = where((batch.outranking & options.refused[o]) == 0, total, none);
    option = where(total > highest, Longs{} + o, option);
    second = larger(second, smaller(highest, total));
    highest = larger(highest, total);
  }
  return {.by_rank = false, .rank = Doubles{}, .total = highest, .option = option, .tied = second == highest};
}

// The same among all options, by the infinities that they keep first.
RAREFY_INLINE Choice choose_by_rank(const Options& options, const Batch& batch) {
  const Doubles none = Doubles{} - __builtin_inf();
  Choice best{.by_rank = true, .rank = none, .total = none, .option = {}, .tied = {}};
  for (int o = 0; o < options.number; o++) {
    const Doubles total = sum_of(batch.finite, options.places[o], options.kept);
    const Doubles rank = sum_of(batch.ranks, options.places[o], options.kept);
    const Longs level = rank == best.rank;
    const Longs better = ((total > best.total) & level) | (rank > best.rank);
    const Longs same = (total == best.total) & level;
    best.rank = where(better, rank, best.rank);
    best.tied = where(better, Longs{}, best.tied | same);
    best.total = where(better, total, best.total);
    best.option = where(better, Longs{} + o, best.option);
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
      rank += best.by_rank ? batch.ranks[place][lane] : 0;
      sum += keys[place];
    }
    const bool refused = !best.by_rank && batch.outranking[lane] & options.refused[o];
    if (refused || total != best.total[lane] || rank != best.rank[lane] || sum <= highest) continue;
    highest = sum;
    option = o;
  }
  return option;
}

template <int kKept>
RAREFY_INLINE Choice chosen(const Options& options, Batch& batch, int size) {
  set_infinities_apart(batch, size);
  if (!batch.has_infinities) return choose<kKept, false>(options, batch);
  const Choice best = choose<kKept, true>(options, batch);
  int64_t found = -1;
  const Longs has_option = best.total > Doubles{} - __builtin_inf();
  for (int t = 0; t < kTiles; t++) found &= has_option[t];
  if (found) return best;
  fill_ranks(batch, size);
  return choose_by_rank(options, batch);
}

template <int kSide, int kCount>
void keep_best_of(const KeepRegularCall& c, const Options& options, Batch& batch, int64_t first, int wanted) {
  load_batch<kSide>(c, first, wanted, batch);
  const Choice best = chosen<kSide * kCount>(options, batch, kSide * kSide);
  for (int t = 0; t < wanted; t++) {
    const int option =
        best.tied[t] ? settled(c, options, batch, best, t, first + t) : static_cast<int>(best.option[t]);
    store_tile(c, first + t, kSide, c.options + option * kSide * kSide);
  }
}

template <int kSide, int kCount>
void keep_best_in(const KeepRegularCall& c) {
  const Options options = options_of(c);
  const int64_t tiles = c.rows / c.side * (c.columns / c.side);
  const int64_t batches = (tiles + kTiles - 1) / kTiles;
#pragma omp parallel num_threads(c.threads)
  {
    Batch batch{};
#pragma omp for schedule(static)
    for (int64_t b = 0; b < batches; b++)
      keep_best_of<kSide, kCount>(c, options, batch, b * kTiles, static_cast<int>(min_of(int64_t{kTiles}, tiles - b * kTiles)));
  }
}

RAREFY_INLINE void keep_best(const KeepRegularCall& c) {
  if (c.side == 2) keep_best_in<2, 1>(c);
  if (c.side == 3) c.count == 1 ? keep_best_in<3, 1>(c) : keep_best_in<3, 2>(c);
  if (c.side == 4 && c.count == 1) keep_best_in<4, 1>(c);
  if (c.side == 4 && c.count == 2) keep_best_in<4, 2>(c);
  if (c.side == 4 && c.count == 3) keep_best_in<4, 3>(c);
}

}  // namespace rarefy::RAREFY_ISA
