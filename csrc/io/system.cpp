#include "system.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <sys/vfs.h>
#endif

namespace goku::io {
namespace {

// The system's page size on most machines, and never less than a disk's logical block. A file
// system that does not say what it wants (Linux before 6.1) is satisfied with it.
constexpr std::uint32_t kUsualAlignment = 4096;

template <typename Result>
Result or_errno(Result result) {
  return result < 0 ? static_cast<Result>(-errno) : result;
}

#if defined(__linux__)
constexpr long kTmpfsMagic = 0x01021994;
constexpr long kRamfsMagic = static_cast<long>(0x858458f6);
#endif

}  // namespace

int System::open(const char* path, int flags, mode_t mode) {
  int result;
  do {
    result = or_errno(::open(path, flags | O_CLOEXEC, mode));
  } while (result == -EINTR);
  return result;
}

int System::duplicate(int fd) { return or_errno(::fcntl(fd, F_DUPFD_CLOEXEC, 0)); }

int System::close(int fd) {
  const int result = or_errno(::close(fd));
  return result == -EINTR ? 0
                          : result;  // Linux has closed it; a second call could hit another file
}

int System::unlink(const char* path) { return or_errno(::unlink(path)); }

int System::size(int fd, std::uint64_t* bytes) {
  struct stat status{};
  const int result = or_errno(::fstat(fd, &status));
  if (result == 0) *bytes = static_cast<std::uint64_t>(status.st_size);
  return result;
}

int System::set_direct(int fd, bool on) {
#if defined(O_DIRECT)
  const int flags = or_errno(::fcntl(fd, F_GETFL));
  if (flags < 0) return flags;
  return or_errno(::fcntl(fd, F_SETFL, on ? flags | O_DIRECT : flags & ~O_DIRECT));
#else
  (void)fd;
  return on ? -EINVAL : 0;
#endif
}

DirectLimits System::direct_limits(int fd) {
#if defined(O_DIRECT) && defined(STATX_DIOALIGN)
  struct statx status{};
  if (::statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 &&
      (status.stx_mask & STATX_DIOALIGN) != 0) {
    return {status.stx_dio_mem_align, status.stx_dio_offset_align};
  }
#endif
  (void)fd;
  return {kUsualAlignment, kUsualAlignment};
}

bool System::in_memory(int fd) {
#if defined(__linux__)
  struct statfs status{};
  if (::fstatfs(fd, &status) != 0) return false;
  const long type = static_cast<long>(status.f_type);
  return type == kTmpfsMagic || type == kRamfsMagic;
#else
  (void)fd;
  return false;
#endif
}

int System::allocate(int fd, std::uint64_t bytes) {
#if defined(__linux__)
  int result;
  do {
    result = or_errno(::fallocate(fd, 0, 0, static_cast<off_t>(bytes)));
  } while (result == -EINTR);
  return result == -ENOSYS ? -EOPNOTSUPP : result;
#else
  (void)fd, (void)bytes;
  return -EOPNOTSUPP;
#endif
}

int System::truncate(int fd, std::uint64_t bytes) {
  int result;
  do {
    result = or_errno(::ftruncate(fd, static_cast<off_t>(bytes)));
  } while (result == -EINTR);
  return result;
}

int System::sync(int fd) {
  int result;
  do {
#if defined(__APPLE__)
    result = or_errno(::fcntl(fd, F_FULLFSYNC));  // fsync there stops at the drive's own cache
#else
    result = or_errno(::fsync(fd));
#endif
  } while (result == -EINTR);
  return result;
}

void System::forget(int fd) {
#if defined(__linux__)
  ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
#else
  (void)fd;
#endif
}

std::int64_t System::read(int fd, void* memory, std::size_t length, std::uint64_t offset) {
  return or_errno<std::int64_t>(::pread(fd, memory, length, static_cast<off_t>(offset)));
}

std::int64_t System::write(int fd, const void* memory, std::size_t length, std::uint64_t offset) {
  return or_errno<std::int64_t>(::pwrite(fd, memory, length, static_cast<off_t>(offset)));
}

int System::uring_setup(unsigned entries, void* params) {
#if defined(__linux__) && defined(SYS_io_uring_setup)
  return or_errno(static_cast<int>(::syscall(SYS_io_uring_setup, entries, params)));
#else
  (void)entries, (void)params;
  return -ENOSYS;
#endif
}

std::int64_t System::ring_result(bool, std::uint64_t, std::size_t, std::int64_t result) {
  return result;
}

System& System::real() {
  // Never destroyed: threads of an engine that nobody closed still use it while the process ends.
  static System* const system = new System;
  return *system;
}

}  // namespace goku::io
