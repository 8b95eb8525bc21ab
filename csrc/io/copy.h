// Copies between places of memory, for staging: what training waits for.
#pragma once

#include <cstddef>
#include <vector>

namespace goku::io {

struct Move {
  unsigned char* target;
  const unsigned char* source;
  std::size_t length;  // bytes
};

// Makes all moves, none of which may touch another's target, by as many threads as asked for: this
// one and others that end before it returns (fewer where the system has none to give). Threads take
// pieces as they finish: one that a neighbour holds up delays its piece, not half of the bytes.
void copy(const std::vector<Move>& moves, std::size_t threads);

}  // namespace goku::io
