#include "writer.h"

#include <errno.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>

#include "crc32c.h"
#include "errors.h"

namespace goku::io {
namespace {

// What is brought together lies in the engine's memory: as little of that as the device is content
// with (2 MiB each: 0.99 of the raw rate with 32 under way), and where the system copies it once
// more, no more than stays in a core's cache.
constexpr std::size_t kGathered = std::size_t{2} << 20;
constexpr std::size_t kGatheredBuffered = std::size_t{1} << 20;

}  // namespace

std::vector<Extent> write_extents(const std::int64_t* values, std::size_t count) {
  std::vector<Extent> extents;
  extents.reserve(count);
  for (std::size_t index = 0; index < count; ++index) {
    const std::int64_t* const row = values + 3 * index;
    if (row[0] < 0 || row[1] < 0 || (row[2] <= 0 && row[1] > 0)) {
      throw std::invalid_argument(
          "extent " + std::to_string(index) + " is (" + std::to_string(row[0]) + ", " +
          std::to_string(row[1]) + ", " + std::to_string(row[2]) +
          "); allowed are an offset and a length of 0 and above, and an address above 0");
    }
    if (row[1] == 0) continue;
    extents.push_back({static_cast<std::uint64_t>(row[0]), static_cast<std::uint64_t>(row[1]),
                       reinterpret_cast<const unsigned char*>(row[2])});
  }
  return extents;
}

Writer::Writer(Pool& pool, std::unique_ptr<File> file, std::uint64_t size, std::uint32_t chunk,
               std::size_t block, bool sync)
    : pool_(pool),
      file_(std::move(file)),
      size_(size),
      chunk_(chunk),
      block_(block),
      sync_(sync),
      direct_at_first_(file_->direct()),
      crcs_((size + chunk - 1) / chunk),
      submitted_(crcs_.size()) {}

// ---- the caller's side ----

void Writer::check_open() const {
  if (error_ != 0) throw IoError(error_, file_->path());
  if (cancelled_) throw IoError(ECANCELED, file_->path());
}

void Writer::refuse(const std::string& what) const {
  throw std::invalid_argument(what + " (" + file_->path() + ")");
}

void Writer::check_range(std::uint64_t offset, std::uint64_t length) const {
  if (length == 0) refuse("length is 0; allowed is 1 and above");
  if (offset % chunk_ != 0) {
    refuse("offset is " + std::to_string(offset) + "; allowed are multiples of the chunk, " +
           std::to_string(chunk_));
  }
  if (offset > size_ || length > size_ - offset) {
    refuse("offset is " + std::to_string(offset) + " and length " + std::to_string(length) +
           "; the file has " + std::to_string(size_) + " bytes");
  }
  if (length % chunk_ != 0 && offset + length != size_) {
    refuse("length is " + std::to_string(length) + "; allowed are multiples of the chunk, " +
           std::to_string(chunk_) + ", and what reaches the end of the file");
  }
  for (std::uint64_t at = offset; at < offset + length; at += chunk_) {
    if (submitted_[at / chunk_]) {
      refuse("offset is " + std::to_string(offset) + " and length " + std::to_string(length) +
             ": the bytes from " + std::to_string(at) + " on were submitted before");
    }
  }
}

void Writer::check_extents(const std::vector<Extent>& extents, std::uint64_t offset,
                           std::uint64_t length) const {
  std::uint64_t end = offset;
  for (std::size_t index = 0; index < extents.size(); ++index) {
    const Extent& one = extents[index];
    const bool fits = one.offset >= end && one.offset <= offset + length &&
                      one.length <= offset + length - one.offset;
    if (!fits) {
      refuse("extent " + std::to_string(index) + " has offset " + std::to_string(one.offset) +
             " and length " + std::to_string(one.length) + "; allowed is what lies in " +
             std::to_string(end) + " to " + std::to_string(offset + length));
    }
    end = one.offset + one.length;
  }
}

Ticket Writer::submit(const unsigned char* memory, std::uint64_t offset, std::uint64_t length) {
  if (memory == nullptr && length > 0) refuse("buffer_address is 0");
  return enqueue({0, memory, offset, length, nullptr});
}

Ticket Writer::gather(std::vector<Extent> extents, std::uint64_t offset, std::uint64_t length) {
  if (offset <= size_ && length <= size_ - offset) check_extents(extents, offset, length);
  const std::vector<Extent>* kept;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    gathered_.push_back(std::move(extents));
    kept = &gathered_.back();
  }
  return enqueue({0, nullptr, offset, length, kept});
}

Ticket Writer::enqueue(Piece piece) {
  Ticket ticket;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    check_open();
    check_range(piece.offset, piece.length);  // a finished file has no bytes left to submit
    for (std::uint64_t at = piece.offset; at < piece.offset + piece.length; at += chunk_)
      submitted_[at / chunk_] = true;
    submitted_bytes_ += piece.length;
    ticket = piece.ticket = ++last_ticket_;
    open_[ticket] = piece.length;
    pending_.push_back(piece);
  }
  pool_.add(shared_from_this());
  return ticket;
}

bool Writer::done(Ticket ticket) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (ticket == 0 || ticket > last_ticket_) {
    throw std::invalid_argument("ticket is " + std::to_string(ticket) + "; given out were 1 to " +
                                std::to_string(last_ticket_));
  }
  return open_.count(ticket) == 0;
}

template <typename Ready>
bool Writer::wait_until(std::unique_lock<std::mutex>& lock, Patience patience, Ready ready) {
  // From about a century on, adding to the clock would overflow.
  if (!patience || *patience > 3e9) {
    changed_.wait(lock, ready);
    return true;
  }
  const auto now = std::chrono::steady_clock::now();
  const auto end = now + std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                             std::chrono::duration<double>(std::max(*patience, 0.0)));
  return changed_.wait_until(lock, end, ready);
}

bool Writer::wait(Ticket ticket, Patience patience) {
  done(ticket);  // refuses an unknown one
  std::unique_lock<std::mutex> lock(mutex_);
  if (!wait_until(lock, patience, [&] { return open_.count(ticket) == 0; })) return false;
  check_open();
  return true;
}

bool Writer::wait_all(Patience patience) {
  std::unique_lock<std::mutex> lock(mutex_);
  return wait_until(lock, patience, [&] { return open_.empty(); });
}

std::uint64_t Writer::written() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return written_;
}

std::pair<std::uint64_t, std::uint32_t> Writer::finish() {
  const std::lock_guard<std::mutex> alone(finishing_);
  wait_all(std::nullopt);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (finished_) return {size_, crc_};
    check_open();
    if (submitted_bytes_ != size_) {
      throw std::invalid_argument(file_->path() + " has " + std::to_string(size_) + " bytes, " +
                                  std::to_string(submitted_bytes_) + " were submitted");
    }
  }
  // Complete: no more submissions, no request under way; from here on this thread's alone.
  std::uint32_t crc = 0;
  const Crc32cJoiner join(chunk_);
  for (std::size_t index = 0; index < crcs_.size(); ++index) {
    const std::uint64_t length = std::min<std::uint64_t>(chunk_, size_ - index * chunk_);
    crc = length == chunk_ ? join(crc, crcs_[index]) : crc32c_combine(crc, crcs_[index], length);
  }
  int error = 0;
  try {
    if (!tail_.empty()) file_->write_buffered(tail_.data(), tail_.size(), size_ - tail_.size());
    if (sync_) file_->sync();
    file_->close();
  } catch (const IoError& failure) {
    error = failure.code();
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  error_ = error;
  check_open();
  crc_ = crc;
  finished_ = true;
  return {size_, crc_};
}

std::vector<std::uint32_t> Writer::chunk_crcs() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_open();
  if (!finished_) throw std::invalid_argument(file_->path() + " is not finished yet");
  return crcs_;
}

void Writer::cancel() {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    if (finished_) return;
    cancelled_ = true;
    drop_pending();
    changed_.wait(lock, [this] { return under_way_ == 0; });
  }
  // A finish() that was waiting comes back first; one that is in fsync is let finish.
  const std::lock_guard<std::mutex> alone(finishing_);
  try {
    file_->close();
  } catch (const IoError&) {
    // What the file holds is of no interest any more.
  }
}

// ---- the pool's side ----

bool Writer::next(Request* request) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (pending_.empty()) return false;
  Piece& piece = pending_.front();
  const std::size_t most = piece.extents == nullptr ? block_ : gathered_block();
  const std::size_t length = piece.length <= most ? static_cast<std::size_t>(piece.length) : most;
  request->file = file_.get();
  request->write = true;
  // Never written to: a request has one pointer for both directions.
  request->memory = const_cast<unsigned char*>(piece.memory);
  request->offset = piece.offset;
  request->length = length;
  request->needed = length;
  request->asked = length;
  request->tag = piece.ticket;
  request->parts = piece.extents;
  if (piece.memory != nullptr) piece.memory += length;
  piece.offset += length;
  piece.length -= length;
  if (piece.length == 0) pending_.pop_front();
  ++under_way_;
  return true;
}

void Writer::prepare(Slot* slot) {
  Request& request = slot->request;
  const auto* const extents = static_cast<const std::vector<Extent>*>(request.parts);
  unsigned char* const together = extents == nullptr ? nullptr : slot->room(request.length);
  if (together != nullptr) request.memory = together;
  for (std::size_t at = 0; at < request.length; at += chunk_) {
    const std::size_t length = std::min<std::size_t>(chunk_, request.length - at);
    if (together != nullptr) bring(*extents, request.offset + at, length, together + at);
    crcs_[(request.offset + at) / chunk_] = crc32c(0, request.memory + at, length);
  }
  if (!file_->direct()) return;
  const std::size_t whole = request.length / kAlignment * kAlignment;
  if (whole != request.length) {
    tail_.assign(request.memory + whole, request.memory + request.length);
    request.length = request.needed = whole;
  }
  if (reinterpret_cast<std::uintptr_t>(request.memory) % file_->memory_alignment() != 0) {
    unsigned char* const copy = slot->room(whole);
    std::memcpy(copy, request.memory, whole);
    request.memory = copy;
  }
}

std::size_t Writer::gathered_block() const {
  const std::size_t most = std::min(file_->direct() ? kGathered : kGatheredBuffered, block_);
  return std::max<std::size_t>(most / chunk_ * chunk_, chunk_);
}

void Writer::bring(const std::vector<Extent>& extents, std::uint64_t begin, std::size_t length,
                   unsigned char* memory) {
  // The first that ends after `begin`.
  auto one = std::upper_bound(extents.begin(), extents.end(), begin,
                              [](std::uint64_t place, const Extent& extent) {
                                return place < extent.offset + extent.length;
                              });
  const std::uint64_t end = begin + length;
  std::uint64_t at = begin;
  for (; one != extents.end() && one->offset < end; ++one) {
    const std::uint64_t low = std::max(one->offset, begin);
    const std::uint64_t high = std::min(one->offset + one->length, end);
    if (low > at) std::memset(memory + (at - begin), 0, low - at);
    if (high > low)
      std::memcpy(memory + (low - begin), one->memory + (low - one->offset), high - low);
    at = std::max(at, high);
  }
  if (at < end) std::memset(memory + (at - begin), 0, end - at);
}

void Writer::finish(const Request& request) {
  const std::lock_guard<std::mutex> lock(mutex_);
  --under_way_;
  if (!file_->direct()) left_direct_.store(true);
  if (request.error != 0) {
    if (error_ == 0) error_ = request.error;
    drop_pending();
  } else {
    written_ += request.asked;
  }
  credit(request.tag, request.asked);
  // Under the lock: the waiting thread may destroy what it waited for as soon as it sees the end.
  changed_.notify_all();
}

void Writer::credit(Ticket ticket, std::uint64_t bytes) {
  const auto found = open_.find(ticket);
  found->second -= bytes;
  if (found->second == 0) open_.erase(found);
}

void Writer::drop_pending() {
  for (const Piece& piece : pending_) credit(piece.ticket, piece.length);
  pending_.clear();
  changed_.notify_all();
}

}  // namespace goku::io
