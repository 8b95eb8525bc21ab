// A file, or parts of it, read and checked.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "errors.h"
#include "pool.h"
#include "segments.h"

namespace goku::io {

struct ReadStats {
  std::uint64_t bytes_read = 0;    // from the file
  std::uint64_t bytes_wanted = 0;  // by the segments
  std::uint64_t requests = 0;
};

class Reader final : public Source {
 public:
  using Patience = std::optional<double>;
  // Reads what the plan says, whose unit is the chunk if there are checksums. Each stretch is
  // verified before a byte of it is copied out.
  Reader(Pool& pool, std::unique_ptr<File> file, std::uint64_t size, std::uint32_t chunk,
         ReadPlan plan, std::optional<std::vector<std::uint32_t>> crcs);
  // Reads everything in requests of `block` bytes, for its checksums alone.
  Reader(Pool& pool, std::unique_ptr<File> file, std::uint64_t size, std::uint32_t chunk,
         std::size_t block);

  void start();
  // Waits for the end; false: not yet.
  bool wait(Patience patience);
  // Throws ChunkError for the first bad chunk of all that are read, IoError, or
  // std::invalid_argument for a file that ended early. Waits.
  ReadStats result();
  // Of the whole file, when it was read for them.
  std::uint32_t crc() const;
  const std::vector<std::uint32_t>& chunk_crcs() const noexcept { return found_; }

  std::uint64_t bytes_done() const;  // read and verified
  std::uint64_t bytes_total() const noexcept { return total_; }
  std::uint64_t size() const noexcept { return size_; }
  const std::string& path() const noexcept { return file_->path(); }

  bool next(Request* request) override;
  void prepare(Slot* slot) override;
  void finish(const Request& request) override;
  void cancel() override;
  // The work comes after the transfer: a worker with several of them done would sum and copy one
  // after another while others have nothing to do (8 requests in all: 0.87 to 0.90 of the raw rate with
  // several a worker, 1.01 with one).
  std::size_t most_in_ring() const override { return 1; }

 private:
  std::optional<BadChunk> check(std::uint64_t begin, std::uint64_t end,
                                const unsigned char* memory);
  std::size_t stretches() const;
  Stretch stretch(std::size_t index) const;

  Pool& pool_;
  const std::unique_ptr<File> file_;
  const std::uint64_t size_;
  const std::uint32_t chunk_;
  const std::optional<ReadPlan> plan_;
  const std::size_t block_ = 0;  // without a plan
  const std::optional<std::vector<std::uint32_t>> wanted_;
  std::vector<std::uint32_t> found_;  // without a plan; each chunk by one worker
  std::uint64_t total_ = 0;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t next_ = 0;  // stretch
  std::size_t under_way_ = 0;
  std::uint64_t done_ = 0;
  ReadStats stats_;
  int error_ = 0;
  bool cancelled_ = false;
  std::optional<std::uint64_t> ended_at_;
  std::optional<BadChunk> bad_;
};

}  // namespace goku::io
