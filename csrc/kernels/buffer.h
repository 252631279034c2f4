// Scratch memory of one call. No std::unique_ptr: standard templates must not be instantiated per instruction set.
#pragma once
#include <cstddef>
#include <cstdlib>

#include "pages.h"
#include "simd.h"

namespace rarefy::RAREFY_ISA {

class Buffer {
 public:
  explicit Buffer(size_t bytes)
      : data_(bytes ? aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr), ok_(!bytes || data_) {
    want_large_pages(data_, static_cast<int64_t>(bytes));
  }
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  bool ok() const { return ok_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
  bool ok_;
};

}  // namespace rarefy::RAREFY_ISA
