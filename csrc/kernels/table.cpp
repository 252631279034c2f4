#include "operations.h"

namespace rarefy::RAREFY_ISA {

extern const KernelTable kernels;
const KernelTable kernels{forward, backward, keep_top, select, keep_n_of_m, block_sums};

}  // namespace rarefy::RAREFY_ISA
