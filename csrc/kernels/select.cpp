// Inactive positions: filled with a number, or looked at for other numbers than zero.
// In place: data = mask ? data : fill, by the bits, so that a NaN at an inactive position vanishes.
#include "kernels.h"
#include "operations.h"
#include "partition.h"

namespace rarefy::RAREFY_ISA {
namespace {

template <class Bits>
void select_bits(const SelectCall& c, int threads) {
  Bits* data = static_cast<Bits*>(c.data);
  const uint8_t* mask = c.mask;
  const Bits fill = static_cast<Bits>(c.fill);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int k = 0; k < threads; k++) {
    const int64_t end = share_begin(c.size, threads, k + 1);
    for (int64_t i = share_begin(c.size, threads, k); i < end; i++) {
      const Bits inactive = static_cast<Bits>(static_cast<Bits>(mask[i]) - 1);
      data[i] = static_cast<Bits>((data[i] & ~inactive) | (fill & inactive));
    }
  }
}

// A chunk fits into the nearest cache, and what it finds ends the search of its thread.
constexpr int64_t chunk = 1 << 12;

template <class Bits>
bool holds_zeros_in(const Bits* data, const uint8_t* mask, int64_t size, int threads) {
  constexpr Bits without_sign = static_cast<Bits>(~(Bits{1} << (8 * sizeof(Bits) - 1)));
  bool holds = true;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(&& : holds)
  for (int k = 0; k < threads; k++) {
    const int64_t end = share_begin(size, threads, k + 1);
    for (int64_t first = share_begin(size, threads, k); first < end && holds; first += chunk) {
      const int64_t last = first + chunk < end ? first + chunk : end;
      Bits found = 0;
      for (int64_t i = first; i < last; i++) found |= static_cast<Bits>(data[i] & (static_cast<Bits>(mask[i]) - 1));
      holds = (found & without_sign) == 0;
    }
  }
  return holds;
}

}  // namespace

bool holds_zeros(const HoldsZerosCall& c) {
  const int threads = useful_threads(c.threads, c.size);
  if (c.element_bytes == 2) return holds_zeros_in(static_cast<const uint16_t*>(c.data), c.mask, c.size, threads);
  if (c.element_bytes == 4) return holds_zeros_in(static_cast<const uint32_t*>(c.data), c.mask, c.size, threads);
  return holds_zeros_in(static_cast<const uint64_t*>(c.data), c.mask, c.size, threads);
}

void select(const SelectCall& c) {
  const int threads = useful_threads(c.threads, c.size);
  if (c.element_bytes == 2) select_bits<uint16_t>(c, threads);
  if (c.element_bytes == 4) select_bits<uint32_t>(c, threads);
  if (c.element_bytes == 8) select_bits<uint64_t>(c, threads);
}

}  // namespace rarefy::RAREFY_ISA
