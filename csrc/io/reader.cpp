#include "reader.h"

#include <errno.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>

#include "crc32c.h"

namespace goku::io {

Reader::Reader(Pool& pool, std::unique_ptr<File> file, std::uint64_t size, std::uint32_t chunk,
               ReadPlan plan, std::optional<std::vector<std::uint32_t>> crcs)
    : pool_(pool),
      file_(std::move(file)),
      size_(size),
      chunk_(chunk),
      plan_(std::move(plan)),
      wanted_(std::move(crcs)) {
  for (std::size_t index = 0; index < stretches(); ++index) {
    const Stretch one = stretch(index);
    total_ += one.end - one.begin;
  }
  stats_.bytes_wanted = plan_->wanted();
}

Reader::Reader(Pool& pool, std::unique_ptr<File> file, std::uint64_t size, std::uint32_t chunk,
               std::size_t block)
    : pool_(pool),
      file_(std::move(file)),
      size_(size),
      chunk_(chunk),
      block_(block),
      found_((size + chunk - 1) / chunk),
      total_(size) {
  stats_.bytes_wanted = size;
}

std::size_t Reader::stretches() const {
  return plan_ ? plan_->stretches() : static_cast<std::size_t>((size_ + block_ - 1) / block_);
}

Stretch Reader::stretch(std::size_t index) const {
  if (plan_) return plan_->stretch(index);
  const std::uint64_t begin = static_cast<std::uint64_t>(index) * block_;
  return {begin, std::min<std::uint64_t>(begin + block_, size_), 0};
}

// ---- the caller's side ----

void Reader::start() { pool_.add(shared_from_this()); }

bool Reader::wait(Patience patience) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto ready = [this] {
    const bool more = next_ < stretches() && error_ == 0 && !cancelled_ && !bad_ && !ended_at_;
    return under_way_ == 0 && !more;
  };
  if (!patience || *patience > 3e9) {
    changed_.wait(lock, ready);
    return true;
  }
  const auto end = std::chrono::steady_clock::now() +
                   std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                       std::chrono::duration<double>(std::max(*patience, 0.0)));
  return changed_.wait_until(lock, end, ready);
}

ReadStats Reader::result() {
  wait(std::nullopt);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (bad_) throw ChunkError(*bad_, file_->path());
  if (error_ != 0) throw IoError(error_, file_->path());
  if (ended_at_) {
    throw std::invalid_argument(file_->path() + " ended at byte " + std::to_string(*ended_at_) +
                                " while it was read; it had " + std::to_string(size_) + " bytes");
  }
  if (cancelled_) throw IoError(ECANCELED, file_->path());
  return stats_;
}

std::uint32_t Reader::crc() const {
  std::uint32_t crc = 0;
  const Crc32cJoiner join(chunk_);
  for (std::size_t index = 0; index < found_.size(); ++index) {
    const std::uint64_t length = std::min<std::uint64_t>(chunk_, size_ - index * chunk_);
    crc = length == chunk_ ? join(crc, found_[index]) : crc32c_combine(crc, found_[index], length);
  }
  return crc;
}

std::uint64_t Reader::bytes_done() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return done_;
}

void Reader::cancel() {
  std::unique_lock<std::mutex> lock(mutex_);
  // One that has read everything keeps its result.
  if (next_ < stretches() || under_way_ > 0) cancelled_ = true;
  changed_.notify_all();
  changed_.wait(lock, [this] { return under_way_ == 0; });
}

// ---- the pool's side ----

bool Reader::next(Request* request) {
  const std::lock_guard<std::mutex> lock(mutex_);
  // In the file's order: when a bad chunk turns up, all that lie before it are under way already,
  // and the first of all is found.
  if (next_ >= stretches() || error_ != 0 || cancelled_ || bad_ || ended_at_) return false;
  const Stretch one = stretch(next_);
  request->file = file_.get();
  request->offset = one.begin;
  request->asked = request->needed = request->length =
      static_cast<std::size_t>(one.end - one.begin);
  request->tag = next_++;
  ++under_way_;
  return true;
}

void Reader::prepare(Slot* slot) {
  Request& request = slot->request;
  const std::size_t rounded = (request.length + kAlignment - 1) / kAlignment * kAlignment;
  request.memory = slot->room(rounded);
  // The file's last piece: a direct read ends at an aligned place past the end.
  if (file_->direct()) request.length = rounded;
}

void Reader::finish(const Request& request) {
  std::optional<BadChunk> bad;
  const bool whole = request.error == 0 && request.done >= request.asked;
  if (whole) {
    bad = check(request.offset, request.offset + request.asked, request.memory);
    if (!bad && plan_) plan_->scatter(static_cast<std::size_t>(request.tag), request.memory);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  --under_way_;
  ++stats_.requests;
  stats_.bytes_read += std::min(request.done, request.asked);
  if (request.error != 0) {
    if (error_ == 0) error_ = request.error;
  } else if (!whole) {
    ended_at_ = std::min(ended_at_.value_or(UINT64_MAX), request.offset + request.done);
  } else if (bad) {
    if (!bad_ || bad->offset < bad_->offset) bad_ = bad;
  } else {
    done_ += request.asked;
  }
  // Under the lock: the waiting thread may destroy what it waited for as soon as it sees the end.
  changed_.notify_all();
}

std::optional<BadChunk> Reader::check(std::uint64_t begin, std::uint64_t end,
                                      const unsigned char* memory) {
  if (plan_ && !wanted_) return std::nullopt;
  for (std::uint64_t at = begin; at < end; at += chunk_) {
    const std::uint64_t length = std::min<std::uint64_t>(chunk_, end - at);
    const std::uint32_t found = crc32c(0, memory + (at - begin), static_cast<std::size_t>(length));
    if (!wanted_) {
      found_[at / chunk_] = found;
    } else if (found != (*wanted_)[at / chunk_]) {
      return BadChunk{at, length, (*wanted_)[at / chunk_], found};
    }
  }
  return std::nullopt;
}

}  // namespace goku::io
