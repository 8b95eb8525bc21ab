#include "trace.h"

#include <time.h>

namespace goku::io {

std::int64_t monotonic_ns() noexcept {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::int64_t>(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

void Trace::add(std::int64_t begin_ns, const char* operation,
                const std::shared_ptr<const std::string>& path, std::uint64_t offset,
                std::uint64_t length) {
  if (!on_) return;
  const std::int64_t end_ns = monotonic_ns();
  const std::lock_guard<std::mutex> lock(mutex_);
  events_.push_back({begin_ns, end_ns, operation, path, offset, length});
}

std::vector<Event> Trace::events() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return events_;
}

}  // namespace goku::io
