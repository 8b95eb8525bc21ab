#include "pool.h"

#include <errno.h>

#include <new>

namespace goku::io {

Pool::Pool(System& system, std::size_t depth, std::size_t block, std::size_t threads)
    : system_(system), arena_(depth * block) {
  for (std::size_t index = 0; index < depth; ++index) {
    slots_.push_back(std::make_unique<Slot>());
    slots_.back()->arena = arena_.data() + index * block;
    slots_.back()->arena_bytes = block;
  }
  // The last one lies on top: few requests at a time use few of the bounce buffers.
  for (auto slot = slots_.rbegin(); slot != slots_.rend(); ++slot) free_.push_back(slot->get());
  workers_.reserve(threads);
  try {
    for (std::size_t index = 0; index < threads; ++index)
      workers_.emplace_back(&Pool::work, this);
  } catch (...) {  // a system without threads to give
    stop();
    throw;
  }
}

int Pool::use_ring() {
  int error = 0;
  auto ring = Ring::open(
      system_, static_cast<unsigned>(slots_.size()),
      [this](Slot* slot, std::int64_t result) { return continued(slot, result); }, &error);
  const std::lock_guard<std::mutex> lock(mutex_);
  ring_ = std::move(ring);
  return error;
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
  std::unique_ptr<Ring> ring;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ring = std::move(ring_);
    stopping_ = true;
  }
  ring.reset();  // joins its thread, which may still be giving back the last slot
  wake_.notify_all();
  for (auto& worker : workers_) {
    if (worker.joinable()) worker.join();
  }
}

void Pool::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] {
      return stopping_ || !ready_.empty() || (!free_.empty() && !sources_.empty());
    });
    if (!ready_.empty()) {
      Slot* const slot = ready_.front();
      ready_.pop_front();
      lock.unlock();
      // Either its transfer is over, or it is to go on without the ring.
      if (slot->request.length > 0) transfer(slot);
      complete(slot);
      lock.lock();
      continue;
    }
    if (stopping_) return;
    // One request from each source in turn, so that a long file does not hold up a short one.
    std::shared_ptr<Source> source = std::move(sources_.front());
    sources_.pop_front();
    Slot* const slot = free_.back();
    slot->request = Request{};
    if (!source->next(&slot->request)) {
      source->listed = false;
      lock.unlock();
      source.reset();  // perhaps the last reference, which closes a file
      lock.lock();
      continue;
    }
    free_.pop_back();
    slot->request.source = source;
    sources_.push_back(std::move(source));
    lock.unlock();
    begin(slot);
    lock.lock();
  }
}

void Pool::begin(Slot* slot) {
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
    if (ring_ != nullptr && request.file->direct()) {
      ring_->start(slot);
      return;
    }
    transfer(slot);
  }
  complete(slot);
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

// On the ring's thread. true: the ring goes on with it.
bool Pool::continued(Slot* slot, std::int64_t result) {
  Request& request = slot->request;
  const bool more = request.advance(result);
  if (more && request.file->direct()) return true;
  if (!more) request.length = 0;
  if (!more && !request.source->finishes_on_worker()) {
    complete(slot);
    return false;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ready_.push_back(slot);
  }
  wake_.notify_one();
  return false;
}

void Pool::complete(Slot* slot) {
  slot->request.source->finish(slot->request);
  // The request's reference may be the last one: dropped before the slot is anybody else's, and
  // outside the lock.
  slot->request.source.reset();
  release(slot);
}

void Pool::release(Slot* slot) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(slot);
  }
  wake_.notify_one();
}

}  // namespace goku::io
