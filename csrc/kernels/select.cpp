// In place: data = mask ? data : 0, by the bits, so that a NaN at an inactive position vanishes.
#include "kernels.h"
#include "operations.h"
#include "partition.h"

namespace rarefy::RAREFY_ISA {
namespace {

template <class Bits>
void select_bits(Bits* data, const uint8_t* mask, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int k = 0; k < threads; k++) {
    const int64_t end = share_begin(size, threads, k + 1);
    for (int64_t i = share_begin(size, threads, k); i < end; i++)
      data[i] = static_cast<Bits>(data[i] & -static_cast<Bits>(mask[i]));
  }
}

}  // namespace

void select(const SelectCall& c) {
  const int threads = useful_threads(c.threads, c.size);
  if (c.element_bytes == 2) select_bits(static_cast<uint16_t*>(c.data), c.mask, c.size, threads);
  if (c.element_bytes == 4) select_bits(static_cast<uint32_t*>(c.data), c.mask, c.size, threads);
  if (c.element_bytes == 8) select_bits(static_cast<uint64_t*>(c.data), c.mask, c.size, threads);
}

}  // namespace rarefy::RAREFY_ISA
