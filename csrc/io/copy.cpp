#include "copy.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace goku::io {
namespace {

constexpr std::size_t kPiece = std::size_t{1} << 20;
constexpr std::size_t kMostInPiece = 256;  // moves: each takes time of its own, however short

// From so many bytes in all on, stores go past the caches. Ordinary ones read each line of the
// target before they overwrite it, a third of all traffic (1 GiB by two threads of an AMD EPYC: 48
// ms past the caches, 72 through them); and so much would not stay in a core's cache anyway.
constexpr std::size_t kStreamFrom = std::size_t{8} << 20;
// A shorter move is not worth the partial lines at its ends.
constexpr std::size_t kStreamMove = 4096;

#if defined(__x86_64__)
// SSE2, which every such processor has: what counts is that lines are written whole.
void stream(unsigned char* target, const unsigned char* source, std::size_t length) {
  constexpr std::size_t kLine = 64;
  const std::size_t head = -reinterpret_cast<std::uintptr_t>(target) % kLine;
  std::memcpy(target, source, head);
  target += head, source += head, length -= head;
  const std::size_t whole = length / kLine * kLine;
  for (std::size_t at = 0; at < whole; at += kLine) {
    const auto* const from = reinterpret_cast<const __m128i*>(source + at);
    auto* const to = reinterpret_cast<__m128i*>(target + at);
    const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
    const __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
    _mm_stream_si128(to, a), _mm_stream_si128(to + 1, b);
    _mm_stream_si128(to + 2, c), _mm_stream_si128(to + 3, d);
  }
  std::memcpy(target + whole, source + whole, length - whole);
}
// Streamed stores are seen in no order until this.
void end_streaming() { _mm_sfence(); }
#else
void stream(unsigned char* target, const unsigned char* source, std::size_t length) {
  std::memcpy(target, source, length);
}
void end_streaming() {}
#endif

// Where a piece begins; it ends where the next one does.
struct Place {
  std::size_t move;
  std::size_t offset;
};

std::vector<Place> cut(const std::vector<Move>& moves) {
  std::vector<Place> places;
  std::size_t room = 0, held = 0;
  for (std::size_t number = 0; number < moves.size(); ++number) {
    if (held == kMostInPiece) room = 0;
    for (std::size_t at = 0; at < moves[number].length;) {
      if (room == 0) places.push_back({number, at}), room = kPiece, held = 0;
      const std::size_t taken = std::min(room, moves[number].length - at);
      at += taken, room -= taken;
    }
    ++held;
  }
  places.push_back({moves.size(), 0});
  return places;
}

}  // namespace

void copy(const std::vector<Move>& moves, std::size_t threads) {
  std::size_t total = 0;
  for (const Move& move : moves) total += move.length;
  const bool streamed = total >= kStreamFrom;
  const std::vector<Place> places = cut(moves);
  const std::size_t pieces = places.size() - 1;
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    for (std::size_t piece; (piece = next.fetch_add(1)) < pieces;) {
      const Place begin = places[piece], end = places[piece + 1];
      for (std::size_t number = begin.move; number <= end.move && number < moves.size(); ++number) {
        const Move& move = moves[number];
        const std::size_t first = number == begin.move ? begin.offset : 0;
        const std::size_t last = number == end.move ? end.offset : move.length;
        if (first == last) continue;
        if (streamed && last - first >= kStreamMove)
          stream(move.target + first, move.source + first, last - first);
        else
          std::memcpy(move.target + first, move.source + first, last - first);
      }
    }
    if (streamed) end_streaming();
  };
  std::vector<std::thread> others;
  const std::size_t wanted = std::min(threads, pieces);
  if (wanted > 1) others.reserve(wanted - 1);
  try {
    while (others.size() + 1 < wanted) others.emplace_back(work);
  } catch (...) {  // no thread or memory to be had: those that are there do it all
  }
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace goku::io
