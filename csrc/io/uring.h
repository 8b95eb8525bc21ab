// Linux's io_uring by its system calls: one thread that starts transfers and sees their ends.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "request.h"
#include "system.h"

namespace goku::io {

class Ring {
 public:
  // What became of a transfer: a count or -errno. Called on the ring's thread; true: start the rest
  // of the request.
  using Ended = std::function<bool(Slot*, std::int64_t)>;

  // null, and errno in `error`, where the kernel has none, is too old or refuses (containers do).
  static std::unique_ptr<Ring> open(System& system, unsigned depth, Ended ended, int* error);
  virtual ~Ring() = default;  // no transfer is under way
  // Any thread; never more than `depth` at a time. Does not block.
  virtual void start(Slot* slot) = 0;
};

}  // namespace goku::io
