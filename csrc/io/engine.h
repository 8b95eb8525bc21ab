// The engine: threads, perhaps a ring, and the files that they write and read.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "file.h"
#include "pool.h"
#include "reader.h"
#include "writer.h"

namespace goku::io {

enum class Backend { automatic, io_uring, threads };

struct Options {
  Backend backend = Backend::automatic;
  Direct direct = Direct::automatic;
  std::size_t queue_depth = 0;  // 0: the default
  std::size_t block_bytes = 0;
  std::size_t threads = 0;
  std::size_t memory_budget = 0;  // for bounce buffers; 0: queue_depth * block_bytes
  bool trace = false;
};

constexpr std::uint64_t kSmallestChunk = kAlignment;
// A chunk is read whole, into one bounce buffer.
constexpr std::uint64_t kLargestChunk = std::uint64_t{64} << 20;

// What an engine and its files share: it lives as long as any of them.
class Core {
 public:
  Core(const Options& options, System& system);
  ~Core();

  // Throws in a process that was forked from the one that made it, whose threads do not exist
  // there, and once closed.
  void check() const;
  bool foreign() const noexcept;
  void enlist(const std::shared_ptr<Source>& source);
  void close();
  // The most that a request has, in bytes: whole chunks, at least one.
  std::size_t write_block(std::uint64_t chunk) const;
  std::size_t read_block(std::uint64_t chunk) const;
  // Whose threads write and read a file.
  Pool& writing(const File& file);
  Pool& reading(const File& file);

  System& system;
  Options chosen;
  Backend wanted;
  std::string reason;  // why not io_uring
  std::shared_ptr<Trace> trace;
  std::unique_ptr<Pool> pool;

 private:
  const pid_t process_;
  std::mutex closing_;  // before mutex_
  mutable std::mutex mutex_;
  bool closed_ = false;
  std::vector<std::weak_ptr<Source>> sources_;
  // Made when they are first asked for, where nobody has said how many threads or requests there are
  // to be, or how much memory: for files in memory that are written, and for those that are read.
  Pool& own(std::unique_ptr<Pool>* place, std::size_t threads, std::size_t block);
  const bool may_choose_;
  std::unique_ptr<Pool> into_memory_;
  std::unique_ptr<Pool> from_memory_;
};

// A reference to the core and to one of its sources. When it goes, what is under way is cancelled
// and awaited; in a forked child, where nobody would ever finish it, both are left alone.
template <typename T>
class Handle {
 public:
  Handle(std::shared_ptr<Core> core, std::shared_ptr<T> source)
      : core_(std::move(core)), source_(std::move(source)) {}
  ~Handle() {
    if (core_ == nullptr) return;
    if (core_->foreign()) {
      new std::pair(std::move(core_), std::move(source_));
    } else {
      source_->cancel();
    }
  }
  Handle(Handle&&) noexcept = default;
  Handle& operator=(Handle&&) = delete;

  // Every use from outside goes through it.
  T& operator*() const {
    if (core_->foreign()) core_->check();
    return *source_;
  }
  T* operator->() const { return &**this; }

 private:
  std::shared_ptr<Core> core_;
  std::shared_ptr<T> source_;
};

class Engine {
 public:
  // Throws std::invalid_argument, or IoError where a backend that was asked for is refused.
  explicit Engine(const Options& options, System& system = System::real());
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  Handle<Writer> create(const std::string& path, std::uint64_t size, std::uint64_t chunk, bool sync,
                        unsigned mode);
  // Starts at once. segments: `count` rows of six integers. crcs: one per chunk of the file.
  Handle<Reader> read(const std::string& path, const std::int64_t* segments, std::size_t count,
                      std::uint64_t chunk, std::optional<std::vector<std::uint32_t>> crcs,
                      std::uint64_t size);
  Handle<Reader> checksum(const std::string& path, std::uint64_t chunk);

  // The same on a file that is open already.
  Handle<Writer> write(std::unique_ptr<File> file, std::uint64_t size, std::uint64_t chunk,
                       bool sync);
  Handle<Reader> checksum(std::unique_ptr<File> file, std::uint64_t chunk);

  const Options& chosen() const noexcept { return core_->chosen; }
  const Core& core() const noexcept { return *core_; }
  std::vector<Event> events() const { return core_->trace->events(); }
  // Cancels what is under way; idempotent.
  void close();

 private:
  std::shared_ptr<Core> core_;
};

const char* name(Backend backend) noexcept;
const char* name(Direct direct) noexcept;

}  // namespace goku::io
