// The highest scores of every group of m neighbours: those that fewer than the wanted number beat.
#include "buffer.h"
#include "kernels.h"
#include "keys.h"
#include "operations.h"

namespace rarefy::RAREFY_ISA {
namespace {

// Groups that are ranked together: vectors run along the groups.
constexpr int kBatch = 32;
// Up to this many scores are compared pair by pair.
constexpr int kShort = 16;

// 0 for what is no candidate: below every key, that of NaN too.
RAREFY_INLINE uint32_t key_at(const KeepInGroupsCall& c, int64_t place) {
  return c.candidates && !c.candidates[place] ? 0 : key_of(c.scores[place]);
}

// The keys of a batch, [M][kBatch].
template <int M>
RAREFY_INLINE void load_keys(const float* scores, const uint8_t* candidates, uint32_t (&keys)[M][kBatch]) {
  uint32_t flat[M * kBatch];
  for (int i = 0; i < M * kBatch; i++) flat[i] = key_of(scores[i]);
  if (candidates)
    for (int i = 0; i < M * kBatch; i++) flat[i] = candidates[i] ? flat[i] : 0;
  for (int g = 0; g < kBatch; g++)
    RAREFY_UNROLL for (int i = 0; i < M; i++) keys[i][g] = flat[g * M + i];
}

template <int M>
void keep_batch(const KeepInGroupsCall& c, int64_t first) {
  uint32_t keys[M][kBatch];
  load_keys<M>(c.scores + first * M, c.candidates ? c.candidates + first * M : nullptr, keys);
  int32_t better[M][kBatch] = {};
  int32_t wanted[kBatch] = {};
  for (int i = 0; i < M; i++)
    for (int g = 0; g < kBatch; g++) wanted[g] += keys[i][g] != 0;
  for (int g = 0; g < kBatch; g++) wanted[g] = c.counts[wanted[g]];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < i; j++)
      for (int g = 0; g < kBatch; g++) {
        const int32_t wins = keys[j][g] >= keys[i][g];
        better[i][g] += wins;
        better[j][g] += 1 - wins;
      }
  uint32_t lowest[kBatch];
  uint32_t highest[kBatch] = {};
  memset(lowest, 0xff, sizeof lowest);
  uint8_t kept[M][kBatch];
  for (int i = 0; i < M; i++)
    for (int g = 0; g < kBatch; g++) {
      const uint32_t key = keys[i][g];
      const uint32_t bits = better[i][g] < wanted[g] && key != 0 ? ~0u : 0;  // all of a kept score
      const uint32_t inside = key | ~bits, outside = key & ~bits;
      lowest[g] = inside < lowest[g] ? inside : lowest[g];
      highest[g] = outside > highest[g] ? outside : highest[g];
      kept[i][g] = static_cast<uint8_t>(bits & 1);
    }
  uint8_t* mask = c.mask + first * M;
  for (int g = 0; g < kBatch; g++)
    RAREFY_UNROLL for (int i = 0; i < M; i++) mask[g * M + i] = kept[i][g];
  for (int g = 0; g < kBatch; g++) c.contested[first + g] = lowest[g] == highest[g];
}

void keep_group(const KeepInGroupsCall& c, int64_t group) {
  const int64_t first = group * c.m, end = first + c.m;
  int candidates = 0;
  for (int64_t i = first; i < end; i++) candidates += key_at(c, i) != 0;
  const int wanted = c.counts[candidates];
  uint32_t lowest = ~0u, highest = 0;
  for (int64_t i = first; i < end; i++) {
    const uint32_t key = key_at(c, i);
    int better = 0;
    for (int64_t j = first; j < i; j++) better += key_at(c, j) >= key;
    for (int64_t j = i + 1; j < end; j++) better += key_at(c, j) > key;
    const bool kept = key && better < wanted;
    if (kept && key < lowest) lowest = key;
    if (!kept && key > highest) highest = key;
    c.mask[i] = kept;
  }
  c.contested[group] = lowest == highest;
}

// The highest number that as many keys as wanted reach, bit by bit: each count is one vector pass over the keys, and
// no branch depends on a single one.
uint32_t lowest_kept(const uint32_t* keys, int m, int wanted) {
  uint32_t lowest = 0;
  for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
    const uint32_t raised = lowest | bit;
    int reach = 0;
    for (int i = 0; i < m; i++) reach += keys[i] >= raised;
    if (reach >= wanted) lowest = raised;
  }
  return lowest;
}

// The keys of a long group; how many are candidates.
int load_long(const float* __restrict scores, const uint8_t* __restrict candidates, int m, uint32_t* __restrict keys) {
  for (int i = 0; i < m; i++) keys[i] = key_of(scores[i]);
  if (candidates)
    for (int i = 0; i < m; i++) keys[i] &= -static_cast<uint32_t>(candidates[i] != 0);
  int found = 0;
  for (int i = 0; i < m; i++) found += keys[i] != 0;
  return found;
}

// The mask of the keys that reach a border; how many there are.
int mark_long(const uint32_t* __restrict keys, int m, uint32_t border, uint8_t* __restrict mask) {
  int reach = 0;
  for (int i = 0; i < m; i++) reach += keys[i] >= border;
  for (int i = 0; i < m; i++) mask[i] = keys[i] >= border;
  return reach;
}

// A long group; `keys` has room for m.
void keep_long_group(const KeepInGroupsCall& c, int64_t group, uint32_t* keys) {
  const int64_t first = group * c.m;
  const int found = load_long(c.scores + first, c.candidates ? c.candidates + first : nullptr, c.m, keys);
  const int wanted = min_of(c.counts[found], found);
  const uint32_t lowest = wanted > 0 ? lowest_kept(keys, c.m, wanted) : ~0u;  // ~0: above every key
  int reach = mark_long(keys, c.m, lowest, c.mask + first);
  c.contested[group] = reach > wanted && wanted > 0;
  // Of several that equal the lowest, the last go.
  for (int i = c.m - 1; reach > wanted && i >= 0; i--) {
    if (keys[i] != lowest) continue;
    c.mask[first + i] = 0;
    reach--;
  }
}

bool keep_long_groups(const KeepInGroupsCall& c) {
  const int64_t share = (c.groups + c.threads - 1) / c.threads;
  const Buffer scratch(sizeof(uint32_t) * c.m * c.threads);
  if (!scratch.ok()) return false;
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (int t = 0; t < c.threads; t++) {
    uint32_t* keys = scratch.as<uint32_t>() + static_cast<int64_t>(c.m) * t;
    const int64_t end = min_of((t + 1) * share, c.groups);
    for (int64_t g = t * share; g < end; g++) keep_long_group(c, g, keys);
  }
  return true;
}

// Whole batches with m known to the compiler; how many groups that makes.
template <int M>
int64_t keep_batches(const KeepInGroupsCall& c) {
  const int64_t batches = c.groups / kBatch;
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (int64_t b = 0; b < batches; b++) keep_batch<M>(c, b * kBatch);
  return batches * kBatch;
}

}  // namespace

bool keep_in_groups(const KeepInGroupsCall& c) {
  if (c.m > kShort) return keep_long_groups(c);
  int64_t done = 0;
  if (c.m == 4) done = keep_batches<4>(c);
  if (c.m == 8) done = keep_batches<8>(c);
  if (c.m == 16) done = keep_batches<16>(c);
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (int64_t g = done; g < c.groups; g++) keep_group(c, g);
  return true;
}

}  // namespace rarefy::RAREFY_ISA
