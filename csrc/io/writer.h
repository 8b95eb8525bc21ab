// A file that is written once, every byte of it, in any order.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "pool.h"

namespace goku::io {

using Ticket = std::uint64_t;
// How long to wait, in seconds; none: for ever.
using Patience = std::optional<double>;

// File bytes [offset, offset + length) lie at `memory`.
struct Extent {
  std::uint64_t offset;
  std::uint64_t length;
  const unsigned char* memory;
};

// From rows of three integers. Throws std::invalid_argument with the extent's number.
std::vector<Extent> write_extents(const std::int64_t* values, std::size_t count);

class Writer final : public Source {
 public:
  // Requests have at most `block` bytes, a multiple of `chunk`.
  Writer(Pool& pool, std::unique_ptr<File> file, std::uint64_t size, std::uint32_t chunk,
         std::size_t block, bool sync);

  // Queues file bytes [offset, offset + length), which the caller leaves alone until the ticket is
  // done. Throws std::invalid_argument, or what the file failed with.
  Ticket submit(const unsigned char* memory, std::uint64_t offset, std::uint64_t length);
  // The same for bytes that lie in many places: workers bring them together, and sum them while they
  // are in the cache. The extents are in the file's order; what none of them holds becomes zeros.
  Ticket gather(std::vector<Extent> extents, std::uint64_t offset, std::uint64_t length);
  // The ticket's memory is the caller's again.
  bool done(Ticket ticket) const;
  // Waits for that; false: not yet. Throws once the file has failed or was cancelled.
  bool wait(Ticket ticket, Patience patience);
  // The same for all tickets, without throwing.
  bool wait_all(Patience patience);

  // All bytes are on the disk (sync) and the file is closed: its size and CRC-32C. Throws; may be
  // called again.
  std::pair<std::uint64_t, std::uint32_t> finish();
  // One per chunk; after finish().
  std::vector<std::uint32_t> chunk_crcs() const;

  std::uint64_t written() const;
  std::uint64_t size() const noexcept { return size_; }
  std::uint32_t chunk() const noexcept { return chunk_; }
  const std::string& path() const noexcept { return file_->path(); }
  bool direct() const noexcept { return direct_at_first_ && !left_direct_.load(); }

  bool next(Request* request) override;
  void prepare(Slot* slot) override;
  void finish(const Request& request) override;
  void cancel() override;

 private:
  struct Piece {
    Ticket ticket;
    const unsigned char* memory;
    std::uint64_t offset;
    std::uint64_t length;
    const std::vector<Extent>* extents;  // null: all of it at `memory`
  };
  void check_open() const;
  void check_range(std::uint64_t offset, std::uint64_t length) const;
  void check_extents(const std::vector<Extent>& extents, std::uint64_t offset,
                     std::uint64_t length) const;
  [[noreturn]] void refuse(const std::string& what) const;
  Ticket enqueue(Piece piece);
  std::size_t gathered_block() const;
  // Brings together file bytes [begin, begin + length).
  static void bring(const std::vector<Extent>& extents, std::uint64_t begin, std::size_t length,
                    unsigned char* memory);
  void credit(Ticket ticket, std::uint64_t bytes);
  void drop_pending();
  template <typename Ready>
  bool wait_until(std::unique_lock<std::mutex>& lock, Patience patience, Ready ready);

  Pool& pool_;
  const std::unique_ptr<File> file_;
  const std::uint64_t size_;
  const std::uint32_t chunk_;
  const std::size_t block_;
  const bool sync_;
  const bool direct_at_first_;
  std::atomic<bool> left_direct_{false};

  // Written by the workers, each chunk by one; read after all are done.
  std::vector<std::uint32_t> crcs_;
  // The bytes past the last aligned place, which O_DIRECT cannot write: finish() does, buffered.
  std::vector<unsigned char> tail_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Piece> pending_;
  std::deque<std::vector<Extent>> gathered_;  // of all tickets; a deque does not move them
  std::vector<bool> submitted_;  // per chunk
  std::uint64_t submitted_bytes_ = 0;
  std::unordered_map<Ticket, std::uint64_t> open_;  // ticket -> bytes not written yet
  Ticket last_ticket_ = 0;
  std::uint64_t written_ = 0;
  std::size_t under_way_ = 0;
  int error_ = 0;
  bool cancelled_ = false;
  bool finished_ = false;
  std::uint32_t crc_ = 0;

  std::mutex finishing_;  // one at a time; before mutex_
};

}  // namespace goku::io
