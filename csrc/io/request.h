// One read or write on its way through the engine, and where it comes from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "buffer.h"
#include "file.h"

namespace goku::io {

class Source;

struct Request {
  std::shared_ptr<Source> source;
  File* file = nullptr;
  bool write = false;
  unsigned char* memory = nullptr;
  std::uint64_t offset = 0;
  std::size_t length = 0;  // bytes to transfer; 0: none, after prepare()
  std::size_t needed = 0;  // with so many it is complete: an aligned read may reach past the end
  std::size_t done = 0;    // bytes transferred; less than needed at the end: the file ended
  int error = 0;           // errno
  std::size_t asked = 0;   // the source's own: bytes that the request stands for
  std::uint64_t tag = 0;   // the source's own
  const void* parts = nullptr;  // the source's own
  int attempts = 0;        // since the last progress
  bool refused = false;    // once with EINVAL
  std::int64_t began_ns = 0;

  // Takes in what a call returned for [offset + done, offset + length): a count, 0 for the file's
  // end, or -errno. true: go on with what is left; false: over, well or with `error`.
  // Short transfers and interrupted calls are continued; EINVAL turns a file buffered that may be.
  bool advance(std::int64_t result);
};

// A place in the queue: what is under way, and memory for it if the source has none that fits.
struct Slot {
  Request request;
  unsigned char* arena = nullptr;  // this slot's share of the pool's memory
  std::size_t arena_bytes = 0;
  Buffer own;  // where that is too small

  // At least so many bytes, aligned; what was in it is lost. Throws std::bad_alloc.
  unsigned char* room(std::size_t bytes) {
    if (bytes <= arena_bytes) return arena;
    if (own.size() < bytes) {
      own = Buffer();
      own = Buffer(bytes);
    }
    return own.data();
  }
};

// A file being written or read: hands out requests one by one and takes their ends.
class Source : public std::enable_shared_from_this<Source> {
 public:
  virtual ~Source() = default;
  // Fills in the next request; false: none now. Called under the pool's lock.
  virtual bool next(Request* request) = 0;
  // On a worker, before the transfer: checksums, memory. Sets request.error if it cannot be done.
  virtual void prepare(Slot* slot) = 0;
  // After the transfer, by the same worker, once for every request that next() gave.
  virtual void finish(const Request& request) = 0;
  // Gives out no more requests, and returns when none is under way. Any thread but a worker.
  virtual void cancel() = 0;
  // Requests that one worker has in its ring at a time.
  virtual std::size_t most_in_ring() const { return SIZE_MAX; }

  bool listed = false;  // the pool's, under its lock
};

}  // namespace goku::io
