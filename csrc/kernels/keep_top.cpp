// Exact top-k selection. A sorted sample brackets the k-th key; one pass writes what is surely in or out and collects
// the few positions in between, which are then resolved exactly. Where the bracket misses or holds too many (heavy
// ties), a radix search over the bits finds the threshold instead.
#include <math.h>

#include "buffer.h"
#include "kernels.h"
#include "keys.h"
#include "operations.h"
#include "partition.h"

namespace rarefy::RAREFY_ISA {
namespace {

constexpr int64_t kSmall = 1 << 16;  // below this, one thread and no sampling
constexpr int64_t kBlock = 512;      // scores that are looked at together

struct Scores {
  const float* values;
  const uint8_t* candidates;
  int64_t size;
  int threads;

  // 0 for what is not a candidate: below the key of every score.
  uint32_t key(int64_t i) const { return candidates && !candidates[i] ? 0 : key_of(values[i]); }
  int64_t begin_of(int thread) const { return share_begin(size, threads, thread); }
};

// The k-th highest key, and how many of the keys equal to it belong to the top k.
struct Threshold {
  uint32_t key;
  int64_t ties;
};

int64_t count_candidates(const Scores& s) {
  if (!s.candidates) return s.size;
  int64_t total = 0;
#pragma omp parallel for schedule(static) num_threads(s.threads) reduction(+ : total)
  for (int64_t i = 0; i < s.size; i++) total += s.candidates[i];
  return total;
}

// ---- radix search --------------------------------------------------------------------------------------------

constexpr uint32_t kBins = 2048;
constexpr int kCopies = 4;  // copies: runs of equal keys do not wait for each other

// Histogram of the bits (at most 11) at `shift` of the keys whose higher bits equal `prefix`; kCopies rows a thread.
void histogram(const Scores& s, int shift, uint32_t low_bits, uint32_t high_bits, uint32_t prefix, uint32_t* bins) {
#pragma omp parallel for schedule(static) num_threads(s.threads)
  for (int t = 0; t < s.threads; t++) {
    uint32_t* mine = bins + static_cast<int64_t>(t) * kCopies * kBins;
    memset(mine, 0, sizeof(uint32_t) * kCopies * kBins);
    for (int64_t i = s.begin_of(t), end = s.begin_of(t + 1); i < end; i++) {
      const uint32_t key = s.key(i);
      if ((key & high_bits) == prefix) mine[(i & (kCopies - 1)) * kBins + (key >> shift & low_bits)]++;
    }
  }
}

int64_t bin_total(const uint32_t* bins, int rows, uint32_t bin) {
  int64_t total = 0;
  for (int r = 0; r < rows; r++) total += bins[static_cast<int64_t>(r) * kBins + bin];
  return total;
}

Threshold radix_threshold(const Scores& s, int64_t count, uint32_t* bins) {
  const int shifts[3] = {21, 10, 0};
  uint32_t prefix = 0, high_bits = 0;
  for (int pass = 0; pass < 3; pass++) {
    uint32_t bin = pass == 2 ? kBins / 2 - 1 : kBins - 1;
    histogram(s, shifts[pass], bin, high_bits, prefix, bins);
    for (; bin > 0; bin--) {
      const int64_t here = bin_total(bins, s.threads * kCopies, bin);
      if (here >= count) break;
      count -= here;
    }
    prefix |= bin << shifts[pass];
    high_bits = ~0u << shifts[pass];
  }
  return {prefix, count};
}

// mask = key above the threshold, plus the first `ties` equal ones. `equal` has one place per thread.
void apply_threshold(const Scores& s, Threshold threshold, uint8_t* mask, int64_t* equal) {
#pragma omp parallel for schedule(static) num_threads(s.threads)
  for (int t = 0; t < s.threads; t++) {
    int64_t ties = 0;
    for (int64_t i = s.begin_of(t), end = s.begin_of(t + 1); i < end; i++) {
      const uint32_t key = s.key(i);
      mask[i] = key > threshold.key;
      ties += key == threshold.key;
    }
    equal[t] = ties;
  }
#pragma omp parallel for schedule(static) num_threads(s.threads)
  for (int t = 0; t < s.threads; t++) {
    int64_t left = threshold.ties;
    for (int before = 0; before < t; before++) left -= equal[before];
    for (int64_t i = s.begin_of(t), end = s.begin_of(t + 1); i < end && left > 0; i++)
      if (s.key(i) == threshold.key) mask[i] = 1, left--;
  }
}

bool keep_top_by_radix(const Scores& s, int64_t count, uint8_t* mask, bool* cuts_tie) {
  const Buffer bins(sizeof(uint32_t) * kBins * kCopies * s.threads), equal(sizeof(int64_t) * s.threads);
  if (!bins.ok() || !equal.ok()) return false;
  const Threshold threshold = radix_threshold(s, count, bins.as<uint32_t>());
  apply_threshold(s, threshold, mask, equal.as<int64_t>());
  int64_t ties = 0;
  for (int t = 0; t < s.threads; t++) ties += equal.as<int64_t>()[t];
  *cuts_tie = threshold.ties < ties;
  return true;
}

// ---- bracket -------------------------------------------------------------------------------------------------

// Keys above `high` are in, keys below `low` are out.
struct Bracket {
  uint32_t low, high;
};

// From a fixed pseudo-random sample: five standard deviations around the wanted rank. {0, 0} if there is no use.
Bracket sample_bracket(const Scores& s, double share, uint32_t* sample, int64_t sample_size) {
  uint64_t state = 0x9e3779b97f4a7c15u;
  int64_t found = 0;
  for (int64_t i = 0; i < sample_size; i++) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const uint32_t key = s.key(static_cast<int64_t>((state >> 32) * static_cast<uint64_t>(s.size) >> 32));
    // Without a branch: what is no candidate is written over by the next one.
    sample[found] = key;
    found += key != 0;
  }
  if (found < 1024) return {0, 0};
  const double rank = share * static_cast<double>(found);
  const double margin = 5 * sqrt(rank * (1 - share)) + 4;
  const int64_t upper = static_cast<int64_t>(rank - margin), lower = static_cast<int64_t>(rank + margin);
  const uint32_t low = lower >= found ? 1u : kth_largest(sample, found, lower);
  // The search before has left the highest ones in front.
  const uint32_t high = upper < 1 ? ~0u : kth_largest(sample, min_of(lower, found), upper);
  return {low, high};
}

// Positions inside the bracket, in order; one per thread.
struct Found {
  uint32_t* keys;
  uint32_t* places;  // position minus the begin of the thread's share
  int64_t size, capacity, above;
};

// The bracket as scores, which compare faster than keys. `with_nan`: the bracket has no lower end.
struct Limits {
  float low, high;
  bool with_nan;
};

float score_of(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key ^ 0x80000000u : ~key;
  float score;
  memcpy(&score, &bits, 4);
  return score;
}

// Keys between those of NaN and -inf belong to no score.
constexpr uint32_t kLowestKey = 0x007fffffu, kHighestKey = 0xff800000u;

Limits limits_of(Bracket b) {
  return {b.low < kLowestKey ? 0.f : score_of(b.low), score_of(b.high < kHighestKey ? b.high : kHighestKey),
          b.low < kLowestKey};
}

// A block of scores: mask = above the bracket, inside = in the bracket. Plain loops, which compilers vectorise well.
void classify(const float* scores, const uint8_t* candidates, int64_t size, Limits limits, uint8_t* mask,
              uint8_t* inside) {
  for (int64_t i = 0; i < size; i++) mask[i] = scores[i] > limits.high;
  if (limits.with_nan) {
    for (int64_t i = 0; i < size; i++) inside[i] = !(scores[i] > limits.high);
  } else {
    for (int64_t i = 0; i < size; i++) inside[i] = (scores[i] >= limits.low) & !(scores[i] > limits.high);
  }
  if (!candidates) return;
  for (int64_t i = 0; i < size; i++) {
    mask[i] &= candidates[i];
    inside[i] &= candidates[i];
  }
}

int64_t count_ones(const uint8_t* flags, int64_t size) {
  int64_t total = 0, i = 0;
  for (; i + 8 <= size; i += 8) {
    uint64_t word;
    memcpy(&word, flags + i, 8);
    total += __builtin_popcountll(word);
  }
  for (; i < size; i++) total += flags[i];
  return total;
}

// Written always and kept where it is flagged, without a branch that would be mispredicted.
RAREFY_INLINE void add_flagged(const float* scores, const uint8_t* inside, int64_t i, int64_t place, Found* f) {
  f->keys[f->size] = key_of(scores[i]);
  f->places[f->size] = static_cast<uint32_t>(place + i);
  f->size += inside[i];
}

// Adds the flagged scores of a block, of which there are few, to the list.
void collect(const float* scores, const uint8_t* inside, int64_t size, int64_t place, Found* f) {
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    uint64_t word;
    memcpy(&word, inside + i, 8);
    if (word == 0) continue;
    for (int lane = 0; lane < 8; lane++) add_flagged(scores, inside, i + lane, place, f);
  }
  for (; i < size; i++) add_flagged(scores, inside, i, place, f);
}

// Thread t's share. Stops when there is no room for another block; its size then shows that.
void scan_share(const Scores& s, int t, Limits limits, uint8_t* mask, Found* f) {
  uint8_t inside[kBlock];
  const int64_t begin = s.begin_of(t), end = s.begin_of(t + 1);
  for (int64_t i = begin; i < end; i += kBlock) {
    if (f->size + kBlock >= f->capacity) {
      f->size = f->capacity;
      return;
    }
    const int64_t size = min_of(kBlock, end - i);
    classify(s.values + i, s.candidates ? s.candidates + i : nullptr, size, limits, mask + i, inside);
    f->above += count_ones(mask + i, size);
    collect(s.values + i, inside, size, i - begin, f);
  }
}

// Settles the positions inside the bracket; false if the k-th key is not inside or not all were found.
bool resolve(const Scores& s, int64_t count, const Found* found, uint32_t* keys, uint8_t* mask, bool* cuts_tie) {
  int64_t needed = count, total = 0;
  for (int t = 0; t < s.threads; t++) {
    if (found[t].size == found[t].capacity) return false;
    needed -= found[t].above;
    memcpy(keys + total, found[t].keys, static_cast<size_t>(found[t].size) * sizeof(uint32_t));
    total += found[t].size;
  }
  if (needed < 0 || needed > total) return false;
  if (needed == 0) return true;
  const uint32_t threshold = kth_largest(keys, total, needed);
  int64_t ties = needed, equal = 0;
  for (int64_t i = 0; i < total; i++) {
    ties -= keys[i] > threshold;
    equal += keys[i] == threshold;
  }
  *cuts_tie = ties < equal;
  for (int t = 0; t < s.threads; t++)
    for (int64_t i = 0; i < found[t].size; i++) {
      const uint32_t key = found[t].keys[i];
      const bool tied = key == threshold && ties > 0;
      ties -= tied;
      if (key > threshold || tied) mask[s.begin_of(t) + found[t].places[i]] = 1;
    }
  return true;
}

// 1 = done, 0 = the bracket does not serve, -1 = out of memory.
int keep_top_by_bracket(const Scores& s, int64_t count, int64_t candidates, uint8_t* mask, bool* cuts_tie) {
  const int64_t sample_size = s.size >= 1 << 22 ? 1 << 16 : 1 << 14;
  const int64_t capacity = max_of(int64_t{4096}, s.size / 16 / s.threads);
  const Buffer sample(sizeof(uint32_t) * sample_size), found_buffer(sizeof(Found) * s.threads);
  const Buffer lists(sizeof(uint32_t) * capacity * 3 * s.threads);
  if (!sample.ok() || !found_buffer.ok() || !lists.ok()) return -1;
  const double share = static_cast<double>(count) / static_cast<double>(candidates);
  const Bracket bracket = sample_bracket(s, share, sample.as<uint32_t>(), sample_size);
  if (bracket.low >= bracket.high || bracket.high < kLowestKey) return 0;
  const Limits limits = limits_of(bracket);
  Found* found = found_buffer.as<Found>();
#pragma omp parallel for schedule(static) num_threads(s.threads)
  for (int t = 0; t < s.threads; t++) {
    uint32_t* keys = lists.as<uint32_t>() + 2 * capacity * t;
    found[t] = {keys, keys + capacity, 0, capacity, 0};
    scan_share(s, t, limits, mask, &found[t]);
  }
  return resolve(s, count, found, lists.as<uint32_t>() + 2 * capacity * s.threads, mask, cuts_tie);
}

}  // namespace

bool keep_top(const KeepTopCall& c) {
  const Scores s{c.scores, c.candidates, c.size, c.size < kSmall ? 1 : c.threads};
  const int64_t candidates = count_candidates(s);
  const size_t bytes = static_cast<size_t>(c.size);
  *c.cuts_tie = false;
  if (c.count <= 0 || c.size <= 0) {
    if (bytes) memset(c.mask, 0, bytes);
    return true;
  }
  if (c.count >= candidates) {
    if (c.candidates)
      memcpy(c.mask, c.candidates, bytes);
    else
      memset(c.mask, 1, bytes);
    return true;
  }
  const int settled = c.size < kSmall ? 0 : keep_top_by_bracket(s, c.count, candidates, c.mask, c.cuts_tie);
  return settled ? settled > 0 : keep_top_by_radix(s, c.count, c.mask, c.cuts_tie);
}

}  // namespace rarefy::RAREFY_ISA
