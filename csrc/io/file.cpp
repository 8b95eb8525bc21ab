#include "file.h"

#include <errno.h>
#include <fcntl.h>

#include "errors.h"

namespace goku::io {

File::File(System& system, std::shared_ptr<Trace> trace, const std::string& path, int fd)
    : system_(system),
      trace_(std::move(trace)),
      path_(std::make_shared<const std::string>(path)),
      fd_(fd) {
  if (fd_ < 0) throw IoError(-fd_, path);
  in_memory_ = system_.in_memory(fd_);
}

File::~File() {
  if (fd_ >= 0) system_.close(fd_);
}

void File::check(std::int64_t result) const {
  if (result < 0) throw IoError(static_cast<int>(-result), *path_);
}

std::unique_ptr<File> File::create(System& system, std::shared_ptr<Trace> trace,
                                   const std::string& path, std::uint64_t size, Direct direct,
                                   unsigned mode, bool readable) {
  const int flags = (readable ? O_RDWR : O_WRONLY) | O_CREAT | O_EXCL;
  std::int64_t begin = trace->now();
  const int fd = system.open(path.c_str(), flags, static_cast<mode_t>(mode));
  std::unique_ptr<File> file(new File(system, std::move(trace), path, fd));
  file->record(begin, "create", 0, 0);
  if (size > 0) {
    // The size too, not the blocks alone: writes that extend a file exclude each other, those
    // inside it do not. In memory blocks are pages, which one thread would clear here, and the
    // writes fill again: 0.35 s per GiB.
    begin = file->trace().now();
    const int result = file->in_memory_ ? -EOPNOTSUPP : system.allocate(file->fd_, size);
    if (result == -EOPNOTSUPP) {
      file->check(system.truncate(file->fd_, size));
      file->record(begin, "truncate", 0, size);
    } else {
      file->check(result);
      file->record(begin, "preallocate", 0, size);
    }
  }
  file->enter_direct(direct);
  return file;
}

std::unique_ptr<File> File::open(System& system, std::shared_ptr<Trace> trace,
                                 const std::string& path, Direct direct) {
  const int fd = system.open(path.c_str(), O_RDONLY, 0);
  std::unique_ptr<File> file(new File(system, std::move(trace), path, fd));
  file->enter_direct(direct);
  return file;
}

std::unique_ptr<File> File::duplicate(Direct direct) const {
  std::unique_ptr<File> file(new File(system_, trace_, *path_, system_.duplicate(fd_)));
  file->enter_direct(direct);
  return file;
}

void File::enter_direct(Direct direct) {
  may_leave_direct_ = direct != Direct::on;
  if (direct == Direct::off || (direct == Direct::automatic && in_memory_)) return;
  const DirectLimits limits = system_.direct_limits(fd_);
  const bool fits = limits.memory != 0 && limits.offset != 0 && kAlignment % limits.memory == 0 &&
                    kAlignment % limits.offset == 0;
  // By fcntl and not by a second open(): the path may by then name another file, or one that its
  // mode does not let us open again.
  const int result = fits ? system_.set_direct(fd_, true) : -EINVAL;
  if (result < 0 && direct == Direct::on) throw IoError(-result, *path_);
  if (result < 0) return;
  memory_alignment_ = limits.memory;
  direct_.store(true, std::memory_order_release);
}

bool File::leave_direct() {
  if (!may_leave_direct_) return false;
  // Requests in flight took the flag along when they began.
  if (system_.set_direct(fd_, false) < 0) return false;
  direct_.store(false, std::memory_order_release);
  return true;
}

std::uint64_t File::size() const {
  std::uint64_t bytes = 0;
  check(system_.size(fd_, &bytes));
  return bytes;
}

void File::write_buffered(const unsigned char* memory, std::size_t length, std::uint64_t offset) {
  const bool direct = direct_.load(std::memory_order_acquire);
  if (direct) check(system_.set_direct(fd_, false));
  direct_.store(false, std::memory_order_release);
  for (int attempts = 0; length > 0;) {
    const std::int64_t begin = trace_->now();
    const std::int64_t result = system_.write(fd_, memory, length, offset);
    if ((result == -EINTR || result == -EAGAIN || result == 0) && ++attempts < 100) continue;
    check(result == 0 ? -EIO : result);
    attempts = 0;
    record(begin, "write", offset, static_cast<std::uint64_t>(result));
    memory += result;
    length -= static_cast<std::size_t>(result);
    offset += static_cast<std::uint64_t>(result);
  }
}

void File::sync() {
  const std::int64_t begin = trace_->now();
  check(system_.sync(fd_));
  record(begin, "fsync", 0, 0);
}

void File::close() {
  if (fd_ < 0) return;
  const std::int64_t begin = trace_->now();
  const int fd = fd_;
  fd_ = -1;
  check(system_.close(fd));
  record(begin, "close", 0, 0);
}

}  // namespace goku::io
