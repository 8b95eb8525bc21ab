// One open file: its descriptor, whether its requests bypass the page cache, and its trace.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "system.h"
#include "trace.h"

namespace goku::io {

// Requests begin at multiples of this, in the file and in memory. O_DIRECT asks for the disk's
// logical block (512 to 4096 bytes); file systems that ask for more are read and written buffered.
constexpr std::size_t kAlignment = 4096;

enum class Direct {
  automatic,  // where it works
  on,         // or an error (EINVAL)
  off,
};

class File {
 public:
  // A new file of `size` bytes whose blocks are reserved (not in memory). Throws IoError: EEXIST, ENOSPC (the
  // caller then removes the empty file), ...
  static std::unique_ptr<File> create(System& system, std::shared_ptr<Trace> trace,
                                      const std::string& path, std::uint64_t size, Direct direct,
                                      unsigned mode, bool readable = false);
  // An existing file, to read.
  static std::unique_ptr<File> open(System& system, std::shared_ptr<Trace> trace,
                                    const std::string& path, Direct direct);
  // The same file by a second descriptor, which outlives close() and the name.
  std::unique_ptr<File> duplicate(Direct direct) const;
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int fd() const noexcept { return fd_; }
  const std::string& path() const noexcept { return *path_; }
  // Requests are O_DIRECT. May turn to false while requests are under way.
  bool direct() const noexcept { return direct_.load(std::memory_order_acquire); }
  // On a file system that is memory: nothing is ever waited for.
  bool in_memory() const noexcept { return in_memory_; }
  // What memory has to be aligned to for O_DIRECT.
  std::size_t memory_alignment() const noexcept { return memory_alignment_; }
  // The kernel has refused an O_DIRECT request (EINVAL): from now on buffered. false: not allowed.
  bool leave_direct();

  std::uint64_t size() const;
  void write_buffered(const unsigned char* memory, std::size_t length, std::uint64_t offset);
  void sync();
  void close();
  void forget() { system_.forget(fd_); }

  System& system() const noexcept { return system_; }
  const Trace& trace() const noexcept { return *trace_; }
  void record(std::int64_t begin_ns, const char* operation, std::uint64_t offset,
              std::uint64_t length) const {
    trace_->add(begin_ns, operation, path_, offset, length);
  }

 private:
  File(System& system, std::shared_ptr<Trace> trace, const std::string& path, int fd);
  void enter_direct(Direct direct);
  void check(std::int64_t result) const;

  System& system_;
  std::shared_ptr<Trace> trace_;
  std::shared_ptr<const std::string> path_;
  int fd_;
  std::atomic<bool> direct_{false};
  bool may_leave_direct_ = true;
  bool in_memory_ = false;
  std::size_t memory_alignment_ = kAlignment;
};

}  // namespace goku::io
