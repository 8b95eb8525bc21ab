// Preloaded into the processes of a test (LD_PRELOAD): from a chosen call on, calls on chosen files
// fail, or transfer less than they were asked to. Everything else is the C library's.
//
// There is one rule at a time. It lies in memory that forked processes share, so that a file system
// can fail for all ranks at once.
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

struct Rule {
  std::atomic<bool> on{false};
  char calls[128];  // kinds of calls, with a space around each
  char path[512];   // a part of the file's path
  long skip;        // so many calls are let through before
  long count;       // so many are then changed
  int error;        // errno; 0: a short transfer
  std::size_t most;
  std::atomic<long> seen{0};
  std::atomic<long> changed{0};
};

Rule* shared_rule() {
  void* memory =
      mmap(nullptr, sizeof(Rule), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) abort();
  return new (memory) Rule;
}

Rule* rule = shared_rule();

// Libraries that are loaded before this one may make calls before there is a rule.
bool idle() { return rule == nullptr || !rule->on.load(); }

// Whether this call is one of those to change.
bool chosen(const char* call, const std::string& path) {
  if (std::strstr(rule->calls, (std::string(" ") + call + " ").c_str()) == nullptr) return false;
  if (path.find(rule->path) == std::string::npos) return false;
  const long number = rule->seen.fetch_add(1) - rule->skip;
  return number >= 0 && number < rule->count;
}

std::string path_of(int fd) {
  char name[64], path[4096];
  snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(name, path, sizeof path);
  return length < 0 ? std::string() : std::string(path, static_cast<std::size_t>(length));
}

std::string path_at(int directory, const char* name) {
  return name[0] == '/' || directory == AT_FDCWD ? name : path_of(directory) + "/" + name;
}

int fail() {
  rule->changed.fetch_add(1);
  errno = rule->error;
  return -1;
}

// What the call does; `act` is the real one.
template <typename Act>
auto call(const char* kind, const std::string& path, Act act) -> decltype(act()) {
  return idle() || !chosen(kind, path) ? act() : fail();
}

// The same for a transfer. `act` takes the length.
template <typename Act>
ssize_t transfer(const char* kind, int fd, std::size_t length, bool positioned, Act act) {
  if (idle() || !chosen(kind, path_of(fd))) return act(length);
  if (rule->error != 0) return fail();
  const std::size_t most = rule->most;
  if (length <= most) return act(length);
  rule->changed.fetch_add(1);
  // O_DIRECT takes whole blocks only; to have done more than one says is harmless where the caller
  // says the place of what comes next.
  const std::size_t asked = positioned ? std::min(length, (most + 4095) / 4096 * 4096) : most;
  return std::min(act(asked), static_cast<ssize_t>(most));
}

}  // namespace

#define REAL(name) \
  static const auto real = reinterpret_cast<decltype(&::name)>(dlsym(RTLD_NEXT, #name))

extern "C" {

// ---- for the test, by ctypes ----

void inject_faults(const char* calls, const char* path, long skip, long count, int error,
                   std::size_t most) {
  rule->on = false;
  snprintf(rule->calls, sizeof rule->calls, " %s ", calls);
  snprintf(rule->path, sizeof rule->path, "%s", path);
  rule->skip = skip;
  rule->count = count;
  rule->error = error;
  rule->most = most;
  rule->seen = rule->changed = 0;
  rule->on = true;
}

void end_faults() { rule->on = false; }
long calls_seen() { return rule->seen; }
long calls_changed() { return rule->changed; }

// ---- in the place of the C library's ----

#define TRANSFER(kind, name, pointer)                                                        \
  ssize_t name(int fd, pointer memory, size_t length) {                                      \
    REAL(name);                                                                              \
    return transfer(kind, fd, length, false, [=](size_t n) { return real(fd, memory, n); }); \
  }
#define POSITIONED(kind, name, pointer)                                     \
  ssize_t name(int fd, pointer memory, size_t length, off_t offset) {       \
    REAL(name);                                                             \
    return transfer(kind, fd, length, true,                                 \
                    [=](size_t n) { return real(fd, memory, n, offset); }); \
  }
TRANSFER("read", read, void*)
TRANSFER("write", write, const void*)
POSITIONED("read", pread, void*)
POSITIONED("read", pread64, void*)
POSITIONED("write", pwrite, const void*)
POSITIONED("write", pwrite64, const void*)

#define OPEN(name)                                                        \
  int name(const char* path, int flags, ...) {                            \
    REAL(name);                                                           \
    va_list rest;                                                         \
    va_start(rest, flags);                                                \
    const mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;       \
    va_end(rest);                                                         \
    const auto act = [=] { return real(path, flags, mode); };             \
    return flags & (O_WRONLY | O_RDWR) ? call("open", path, act) : act(); \
  }
OPEN(open)
OPEN(open64)

int fsync(int fd) {
  REAL(fsync);
  return call("fsync", path_of(fd), [=] { return real(fd); });
}

int fallocate(int fd, int mode, off_t offset, off_t length) {
  REAL(fallocate);
  return call("fallocate", path_of(fd), [=] { return real(fd, mode, offset, length); });
}

int ftruncate(int fd, off_t length) noexcept {
  REAL(ftruncate);
  return call("ftruncate", path_of(fd), [=] { return real(fd, length); });
}

int mkdir(const char* path, mode_t mode) noexcept {
  REAL(mkdir);
  return call("mkdir", path, [=] { return real(path, mode); });
}

int rename(const char* from, const char* to) noexcept {
  REAL(rename);
  return call("rename", to, [=] { return real(from, to); });
}

int renameat2(int from_at, const char* from, int to_at, const char* to, unsigned flags) noexcept {
  REAL(renameat2);
  return call("rename", path_at(to_at, to), [=] { return real(from_at, from, to_at, to, flags); });
}

int unlink(const char* path) noexcept {
  REAL(unlink);
  return call("unlink", path, [=] { return real(path); });
}

int unlinkat(int at, const char* name, int flags) noexcept {
  REAL(unlinkat);
  return call("unlink", path_at(at, name), [=] { return real(at, name, flags); });
}

int rmdir(const char* path) noexcept {
  REAL(rmdir);
  return call("unlink", path, [=] { return real(path); });
}

}  // extern "C"
