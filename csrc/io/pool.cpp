#include "pool.h"

#include <errno.h>

#include <new>

namespace goku::io {

Pool::Pool(System& system, std::size_t depth, std::size_t block, std::size_t threads,
           std::vector<std::unique_ptr<Ring>> rings)
    : system_(system), arena_(depth * block), rings_(std::move(rings)) {
  for (std::size_t index = 0; index < depth; ++index) {
    slots_.push_back(std::make_unique<Slot>());
    slots_.back()->arena = arena_.data() + index * block;
    slots_.back()->arena_bytes = block;
  }
  // The last one lies on top: few requests at a time use few of the bounce buffers, which stay in
  // the cache.
  for (auto slot = slots_.rbegin(); slot != slots_.rend(); ++slot) free_.push_back(slot->get());
  share_ = rings_.empty() ? 1 : ring_depth(depth, threads);
  workers_.reserve(threads);
  try {
    for (std::size_t index = 0; index < threads; ++index)
      workers_.emplace_back(&Pool::work, this, rings_.empty() ? nullptr : rings_[index].get());
  } catch (...) {  // a system without threads to give
    stop();
    throw;
  }
}

void Pool::add(std::shared_ptr<Source> source) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (source->listed) return;
    source->listed = true;
    sources_.push_back(std::move(source));
  }
  wake_.notify_all();
}

void Pool::stop() {
  const std::lock_guard<std::mutex> alone(stopping_mutex_);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) {
    if (worker.joinable()) worker.join();
  }
  rings_.clear();
  arena_ = Buffer();
}

void Pool::work(Ring* ring) {
  std::size_t under_way = 0;  // in the ring
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    if (under_way == 0) {
      wake_.wait(lock, [this] { return stopping_ || drawable(0); });
      if (!drawable(0)) return;
    }
    // First what has ended, for its slot; then as much as there may be; then wait.
    const bool take = under_way > 0 && (ring->ready() || !drawable(under_way));
    if (take) {
      lock.unlock();
      if (!ended(ring->wait(), ring)) --under_way;
      lock.lock();
    } else if (Slot* const slot = draw(&lock)) {
      lock.unlock();
      if (begin(slot, ring)) ++under_way;
      lock.lock();
    }
  }
}

// One request from each source in turn, so that a long file does not hold up a short one.
Slot* Pool::draw(std::unique_lock<std::mutex>* lock) {
  std::shared_ptr<Source> source = std::move(sources_.front());
  sources_.pop_front();
  Slot* const slot = free_.back();
  slot->request = Request{};
  if (!source->next(&slot->request)) {
    source->listed = false;
    lock->unlock();
    source.reset();  // perhaps the last reference, which closes a file
    lock->lock();
    return nullptr;
  }
  free_.pop_back();
  slot->request.source = source;
  sources_.push_back(std::move(source));
  return slot;
}

// true: it is in the ring.
bool Pool::begin(Slot* slot, Ring* ring) {
  Request& request = slot->request;
  try {
    request.source->prepare(slot);
  } catch (const std::bad_alloc&) {
    request.error = ENOMEM;
  }
  if (request.error == 0 && request.length > 0) {
    request.began_ns = request.file->trace().now();
    // Buffered transfers are copies, and those are done where the memory is in the cache; a ring
    // would hand them to threads of the kernel.
    if (ring != nullptr && request.file->direct()) {
      ring->start(slot);
      return true;
    }
    transfer(slot);
  }
  complete(slot);
  return false;
}

// true: the rest of it is in the ring.
bool Pool::ended(const Ended& end, Ring* ring) {
  Request& request = end.slot->request;
  const std::int64_t result = system_.ring_result(request.write, request.offset + request.done,
                                                  request.length - request.done, end.result);
  if (request.advance(result)) {
    if (request.file->direct()) {
      ring->start(end.slot);
      return true;
    }
    transfer(end.slot);
  }
  complete(end.slot);
  return false;
}

void Pool::transfer(Slot* slot) {
  Request& request = slot->request;
  for (;;) {
    unsigned char* const memory = request.memory + request.done;
    const std::size_t length = request.length - request.done;
    const std::uint64_t offset = request.offset + request.done;
    const int fd = request.file->fd();
    const std::int64_t result = request.write ? system_.write(fd, memory, length, offset)
                                              : system_.read(fd, memory, length, offset);
    if (!request.advance(result)) return;
  }
}

void Pool::complete(Slot* slot) {
  slot->request.source->finish(slot->request);
  // The request's reference may be the last one: dropped before the slot is anybody else's, and
  // outside the lock.
  slot->request.source.reset();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(slot);
  }
  wake_.notify_one();
}

}  // namespace goku::io
