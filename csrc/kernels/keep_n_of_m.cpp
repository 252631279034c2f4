// N:M selection: in each group of m neighbours, the n highest scores. A score is kept if fewer than n beat it.
#include "kernels.h"
#include "keys.h"
#include "operations.h"

namespace rarefy::RAREFY_ISA {
namespace {

void keep_in_group(const float* scores, int n, int m, uint8_t* mask) {
  for (int i = 0; i < m; i++) {
    const uint32_t key = key_of(scores[i]);
    int better = 0;
    for (int j = 0; j < i; j++) better += key_of(scores[j]) >= key;
    for (int j = i + 1; j < m; j++) better += key_of(scores[j]) > key;
    mask[i] = better < n;
  }
}

// The same with m known to the compiler, which unrolls it.
template <int M>
void keep_groups(const KeepNOfMCall& c) {
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (int64_t g = 0; g < c.groups; g++) {
    uint32_t keys[M];
    int better[M] = {};
    for (int i = 0; i < M; i++) keys[i] = key_of(c.scores[g * M + i]);
    RAREFY_UNROLL for (int i = 0; i < M; i++) {
      RAREFY_UNROLL for (int j = 0; j < i; j++) {
        better[i] += keys[j] >= keys[i];
        better[j] += keys[i] > keys[j];
      }
    }
    for (int i = 0; i < M; i++) c.mask[g * M + i] = better[i] < c.n;
  }
}

}  // namespace

void keep_n_of_m(const KeepNOfMCall& c) {
  if (c.m == 4) return keep_groups<4>(c);
  if (c.m == 8) return keep_groups<8>(c);
  if (c.m == 16) return keep_groups<16>(c);
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (int64_t g = 0; g < c.groups; g++) keep_in_group(c.scores + g * c.m, c.n, c.m, c.mask + g * c.m);
}

}  // namespace rarefy::RAREFY_ISA
