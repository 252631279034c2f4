// Tiles of tokens, cut in groups that have sums of their own. Whoever is free takes the next tile of a group that nobody works
// on: a processor that others disturb holds nobody up, and a group's sums are added in one order whoever adds them.
//
// Groups move from thread to thread, and their sums with them. Blocks, which read and write all sums for few products, lose
// more by that than they gain.
#pragma once
#include <omp.h>

#include "buffer.h"

namespace rarefy::RAREFY_ISA {

class TileQueue {
 public:
  // tiles_of(line): how many tiles a line has, which is a group, or a part of the matrix in a group.
  template <class Function>
  TileQueue(int lines, Function tiles_of) : count_(lines), lines_(lines * sizeof(Line)) {
    for (int i = 0; ok() && i < lines; i++) lines_.as<Line>()[i] = {.next = 0, .end = tiles_of(i), .is_taken = false};
    omp_init_lock(&lock_);
  }
  ~TileQueue() { omp_destroy_lock(&lock_); }
  TileQueue(const TileQueue&) = delete;
  TileQueue& operator=(const TileQueue&) = delete;
  bool ok() const { return lines_.ok(); }

  struct Turn {
    int line = -1;
    int64_t tile = 0;  // of its line
  };
  // Ends this turn and begins another one. False: what is left has somebody who works on it.
  bool next(Turn& turn) {
    // One lock a queue: a name would be one for the whole process, which a fork could take with it while it is held.
    omp_set_lock(&lock_);
    if (turn.line >= 0) lines()[turn.line].is_taken = false;
    turn.line = longest();
    if (turn.line >= 0) {
      lines()[turn.line].is_taken = true;
      turn.tile = lines()[turn.line].next++;
    }
    omp_unset_lock(&lock_);
    return turn.line >= 0;
  }

 private:
  struct Line {
    int64_t next, end;
    bool is_taken;
    int64_t left() const { return is_taken ? 0 : end - next; }
  };

  Line* lines() const { return lines_.as<Line>(); }
  int longest() const {
    int found = -1;
    for (int i = 0; i < count_; i++)
      if (lines()[i].left() > (found < 0 ? 0 : lines()[found].left())) found = i;
    return found;
  }

  int count_;
  Buffer lines_;
  omp_lock_t lock_;
};

// Whether one group more than threads pays: a thread that is ready then finds tiles to take. Its sums have to be few.
RAREFY_INLINE bool spare_group_pays(int threads, int groups, int64_t tiles, int64_t sums) {
  constexpr int64_t most_sums = int64_t{2} << 20, least_tiles = 4;
  return threads > 1 && groups == threads && tiles >= least_tiles * (threads + 1) && sums <= most_sums;
}

}  // namespace rarefy::RAREFY_ISA
