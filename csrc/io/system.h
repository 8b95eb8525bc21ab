// The system calls that the engine makes, behind one small class: tests put one in its place that
// fails where they want it to.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>

namespace goku::io {

// What O_DIRECT asks of a file, in bytes; 0: it cannot be used.
struct DirectLimits {
  std::uint32_t memory = 0;
  std::uint32_t offset = 0;
};

// Every function returns what the call does, or -errno: errno itself does not survive the hand-over
// between threads.
class System {
 public:
  virtual ~System() = default;
  virtual int open(const char* path, int flags, mode_t mode);
  virtual int duplicate(int fd);
  virtual int close(int fd);
  virtual int unlink(const char* path);
  virtual int size(int fd, std::uint64_t* bytes);
  // Turns O_DIRECT on or off; -EINVAL where the file system has none.
  virtual int set_direct(int fd, bool on);
  virtual DirectLimits direct_limits(int fd);
  // The file lives in memory anyway (tmpfs), where O_DIRECT means nothing.
  virtual bool in_memory(int fd);
  // Sets the size and reserves the blocks; -EOPNOTSUPP where that cannot be done.
  virtual int allocate(int fd, std::uint64_t bytes);
  virtual int truncate(int fd, std::uint64_t bytes);
  virtual int sync(int fd);
  // Forgets the page cache of a file whose pages are clean.
  virtual void forget(int fd);
  virtual std::int64_t read(int fd, void* memory, std::size_t length, std::uint64_t offset);
  virtual std::int64_t write(int fd, const void* memory, std::size_t length, std::uint64_t offset);
  virtual int uring_setup(unsigned entries, void* params);
  // What the ring reported for one request, passed on as it is.
  virtual std::int64_t ring_result(bool write, std::uint64_t offset, std::size_t length,
                                   std::int64_t result);

  static System& real();
};

}  // namespace goku::io
