// Memory that the next products read, asked for while these run: a line now and then. Many requests at once would take all
// buffers of the first-level cache, and the products, whose weights come from the second, would wait behind them.
#pragma once
#include "tile.h"

namespace rarefy::RAREFY_ISA {

class Ahead {
 public:
  // Nothing is asked for.
  Ahead() = default;
  // `bytes` from `first` on, in the course of `steps` products. Where there are many of these, reading takes little of the time.
  Ahead(const void* first, int64_t bytes, int64_t steps) {
    constexpr int64_t most_steps_a_line = 8;
    if (!on_intel() || steps <= 0 || steps * 64 > most_steps_a_line * bytes) return;
    next_ = static_cast<const char*>(first);
    step_ = (bytes + steps - 1) / steps;
  }

  bool asks() const { return step_ != 0; }
  // Addresses beyond the end may be asked for: nothing is read.
  __attribute__((always_inline)) void ask() {
    __builtin_prefetch(next_, 0, 2);
    next_ += step_;
  }

 private:
  const char* next_ = nullptr;
  int64_t step_ = 0;
};

}  // namespace rarefy::RAREFY_ISA
