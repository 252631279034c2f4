// Memory that the next products read, asked for while these run: a line now and then. Many requests at once would take all
// buffers of the first-level cache, and the products, whose weights come from the second, would wait behind them.
#pragma once
#include "tile.h"

namespace rarefy::RAREFY_ISA {

class Ahead {
 public:
  // Nothing is asked for.
  Ahead() = default;
  // `bytes` from `first` on, in the course of `steps` products; some lines are left out where there are fewer of these than
  // lines. Nothing where a line has more than eight products, beside which reading it takes little time, and nothing that
  // would push what they read out of the second-level cache.
  Ahead(const void* first, int64_t bytes, int64_t steps) {
    constexpr int64_t most_bytes = int64_t{640} << 10;
    constexpr int64_t most_steps_a_line = 8;
    if (!on_intel() || steps <= 0 || bytes > most_bytes || steps * 64 > most_steps_a_line * bytes) return;
    next_ = static_cast<const char*>(first);
    end_ = next_ + bytes;
    step_ = (bytes + steps - 1) / steps;
  }

  bool asks() const { return next_ < end_; }
  __attribute__((always_inline)) void ask() {
    __builtin_prefetch(next_, 0, 2);
    next_ += step_;
  }

 private:
  const char* next_ = nullptr;
  const char* end_ = nullptr;
  int64_t step_ = 0;
};

}  // namespace rarefy::RAREFY_ISA
