// The engine's threads. Workers draw requests from the sources, prepare them (checksums), and either
// transfer them themselves or hand them to the ring.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "request.h"
#include "system.h"
#include "uring.h"

namespace goku::io {

class Pool {
 public:
  // depth: requests under way at once, with room for `block` bytes each. Without a ring the workers
  // transfer, so threads = depth.
  Pool(System& system, std::size_t depth, std::size_t block, std::size_t threads);
  ~Pool() { stop(); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Before the first source; a ring that the kernel refuses leaves the pool as it was. 0 or errno.
  int use_ring();

  // The source has requests to give. May be called again at any time.
  void add(std::shared_ptr<Source> source);
  // Joins the threads; every source has been cancelled before. Idempotent.
  void stop();

 private:
  void work();
  void begin(Slot* slot);
  void transfer(Slot* slot);
  bool continued(Slot* slot, std::int64_t result);
  void complete(Slot* slot);
  void release(Slot* slot);

  System& system_;
  std::mutex stopping_mutex_;  // one stop() at a time; before mutex_
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Source>> sources_;  // with requests to give, in turn
  std::deque<Slot*> ready_;                      // back from the ring, for a worker
  std::vector<Slot*> free_;
  // Bounce buffers, in one piece for the sake of huge pages: a request of 1 MiB in 4 KiB pages has
  // 256 segments, more than a disk takes at once (virtio: 254), and is read 40% slower.
  Buffer arena_;
  std::vector<std::unique_ptr<Slot>> slots_;
  bool stopping_ = false;
  std::unique_ptr<Ring> ring_;
  std::vector<std::thread> workers_;
};

}  // namespace goku::io
