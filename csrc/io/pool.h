// The engine's threads. Workers draw requests from the sources, prepare them (checksums), and
// either transfer them themselves or hand them to the ring.
#pragma once

#include <algorithm>
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
  // depth: requests under way at once, with room for `block` bytes each. rings: one for each
  // thread, which takes ring_depth() of them, or none: then a thread transfers one request at a
  // time.
  Pool(System& system, std::size_t depth, std::size_t block, std::size_t threads,
       std::vector<std::unique_ptr<Ring>> rings);
  static std::size_t ring_depth(std::size_t depth, std::size_t threads) {
    return (depth + threads - 1) / threads;
  }
  ~Pool() { stop(); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // The source has requests to give. May be called again at any time.
  void add(std::shared_ptr<Source> source);
  // Joins the threads; every source has been cancelled before. Idempotent.
  void stop();

 private:
  void work(Ring* ring);
  // Whether there is something for a worker that has so many under way.
  bool drawable(std::size_t under_way) const {
    return !free_.empty() && !sources_.empty() &&
           under_way < std::min(share_, sources_.front()->most_in_ring());
  }
  Slot* draw(std::unique_lock<std::mutex>* lock);
  bool begin(Slot* slot, Ring* ring);
  bool ended(const Ended& end, Ring* ring);
  void transfer(Slot* slot);
  void complete(Slot* slot);

  System& system_;
  std::mutex stopping_mutex_;  // one stop() at a time; before mutex_
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Source>> sources_;  // with requests to give, in turn
  std::vector<Slot*> free_;
  // Bounce buffers, in one piece for the sake of huge pages: of a request each MiB in 4 KiB pages has
  // 256 segments, more than a disk takes at once (virtio: 254), and is read 40% slower.
  Buffer arena_;
  std::vector<std::unique_ptr<Slot>> slots_;
  bool stopping_ = false;
  std::size_t share_ = 1;  // requests that a thread has under way at most
  std::vector<std::unique_ptr<Ring>> rings_;
  std::vector<std::thread> workers_;
};

}  // namespace goku::io
