// What the system is told of memory that is about to be written.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rarefy {

// Asks for pages of 2 MB instead of 4 KB for memory of which all will be written. From 32 MB on glibc takes it from the
// system in every step, and each page costs an interruption: up to a quarter of a pass. Whether there are large pages is
// up to the system.
static inline void want_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t least = int64_t{32} << 20;
  constexpr uintptr_t page = 4096;
  if (!memory || bytes < least) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t end = (begin + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace rarefy
