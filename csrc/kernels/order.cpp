// Order statistics with the standard library, compiled once.
#include <algorithm>
#include <functional>

#include "kernels.h"

namespace rarefy {

uint32_t kth_largest(uint32_t* keys, int64_t size, int64_t k) {
  std::nth_element(keys, keys + (k - 1), keys + size, std::greater<uint32_t>());
  return keys[k - 1];
}

}  // namespace rarefy
