// What the system is told of memory that is about to be written.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rarefy::RAREFY_ISA {

// Asks for pages of 2 MB instead of 4 KB for a large result. From 32 MB on glibc takes it from the system in every step, and
// each page costs an interruption: a quarter of a backward pass. Whether there are large ones is up to the system.
static inline void want_large_pages(void* result, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t least = size_t{32} << 20, page = 4096;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(result), first = (begin + page - 1) / page * page;
  if (result && bytes >= least) madvise(reinterpret_cast<void*>(first), (begin + bytes - first) / page * page, MADV_HUGEPAGE);
#else
  (void)result, (void)bytes;
#endif
}

}  // namespace rarefy::RAREFY_ISA
