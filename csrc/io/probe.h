// A short look at what a disk likes: the same bytes written and read in several ways.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "engine.h"

namespace goku::io {

struct Trial {
  Options asked;    // 0: left to the engine, which then chooses by file, too
  Options options;  // what that came to
  bool own_threads = false;  // files in memory have their own, whatever options.threads says
  double write_seconds = 0;  // the best of its runs; with preallocation, checksums and fsync
  double read_seconds = 0;   // with checksums; 0 and `error` if it could not be run
  std::string error;
  double seconds() const { return write_seconds + read_seconds; }
};

struct ProbeResult {
  std::vector<Trial> trials;  // the first ones have the defaults
  std::size_t choice = 0;     // index of the one to use
};

// Writes files of `bytes` in the directory, one at a time; each loses its name as soon as it is
// open, so nothing can be left behind. Stops when `seconds` are over, or when go_on() is false:
// then the result has no trials. Throws IoError.
ProbeResult probe(const std::string& directory, double seconds, std::uint64_t bytes,
                  const std::function<bool()>& go_on, System& system = System::real());

}  // namespace goku::io
