// Linux's io_uring by its system calls: a queue of transfers that one thread owns.
#pragma once

#include <cstdint>
#include <memory>

#include "request.h"
#include "system.h"

namespace goku::io {

// What became of a transfer: a count or -errno.
struct Ended {
  Slot* slot;
  std::int64_t result;
};

// Used by one thread only, which need not be the one that opened it.
class Ring {
 public:
  // null, and errno in `error`, where the kernel has none, is too old or refuses (containers do).
  static std::unique_ptr<Ring> open(System& system, unsigned depth, int* error);
  virtual ~Ring() = default;  // no transfer is under way
  // Begins what is left of the slot's request; never more than `depth` at a time.
  virtual void start(Slot* slot) = 0;
  // A transfer has ended already: wait() does not wait.
  virtual bool ready() const = 0;
  // Waits until a transfer has ended.
  virtual Ended wait() = 0;
};

}  // namespace goku::io
