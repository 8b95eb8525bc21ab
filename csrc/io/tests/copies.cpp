// Copies between places of memory: every byte arrives, none beside it changes.
#include <algorithm>

#include "../copy.h"
#include "check.h"

namespace goku::io::testing {
namespace {

// Moves of these lengths from scattered sources into one target with gaps, everything unaligned.
void moved(const std::vector<std::size_t>& lengths, std::size_t threads) {
  constexpr std::size_t kGap = 3;
  std::size_t total = kGap;
  for (const std::size_t length : lengths) total += length + kGap;
  const Bytes before(total, 0xA5);
  Bytes target = before, wanted = before;
  std::vector<Bytes> sources;
  std::vector<Move> moves;
  std::size_t at = kGap;
  for (const std::size_t length : lengths) {
    sources.push_back(noise(length + 1, at));
    const Bytes& source = sources.back();
    moves.push_back({target.data() + at, source.data() + 1, length});
    std::copy(source.begin() + 1, source.end(), wanted.begin() + static_cast<std::ptrdiff_t>(at));
    at += length + kGap;
  }
  copy(moves, threads);
  CHECK(target == wanted);
}

}  // namespace

void test_copies() {
  const std::size_t mib = std::size_t{1} << 20;
  for (const std::size_t threads : {1, 2, 5}) {
    moved({}, threads);
    moved({0, 1, 0, 63, 64, 65, 4095, 4096, 4097, 0}, threads);
    moved({mib - 1, 0, 2 * mib, 3 * mib + 17, 5, 4 * mib}, threads);  // past the caches
    moved(std::vector<std::size_t>(3000, 77), threads);               // many in a piece
    std::vector<std::size_t> mixed(700, 5);  // short ones amid much
    mixed[350] = 9 * mib + 1;
    moved(mixed, threads);
  }
}

}  // namespace goku::io::testing
