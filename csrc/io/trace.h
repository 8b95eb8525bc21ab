// What was asked of the file system and when: the log from which crash tests rebuild every state
// that a power failure could have left.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace goku::io {

struct Event {
  std::int64_t begin_ns;  // CLOCK_MONOTONIC; the call was made
  std::int64_t end_ns;    // and had succeeded
  const char* operation;  // create, preallocate, write, truncate, fsync, close
  std::shared_ptr<const std::string> path;
  std::uint64_t offset;
  std::uint64_t length;
};

std::int64_t monotonic_ns() noexcept;

// Any thread may add; a trace that is off costs one test. Only calls that succeeded are kept: a
// write that was continued stands there as its parts.
class Trace {
 public:
  explicit Trace(bool on) : on_(on) {}
  bool on() const noexcept { return on_; }
  std::int64_t now() const noexcept { return on_ ? monotonic_ns() : 0; }
  void add(std::int64_t begin_ns, const char* operation,
           const std::shared_ptr<const std::string>& path, std::uint64_t offset,
           std::uint64_t length);
  std::vector<Event> events() const;

 private:
  const bool on_;
  mutable std::mutex mutex_;
  std::vector<Event> events_;
};

}  // namespace goku::io
