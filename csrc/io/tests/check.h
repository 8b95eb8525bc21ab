// What the engine's tests share: a check that is there in release builds too, a temporary
// directory, content that is known, and a system whose calls fail when they are told to.
#pragma once

#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "../engine.h"
#include "../errors.h"

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                \
    }                                                                              \
  } while (false)

namespace goku::io::testing {

using Bytes = std::vector<unsigned char>;

class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "goku-io-XXXXXX").string();
    CHECK(::mkdtemp(name.data()) != nullptr);
    path_ = name;
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  std::string fresh() { return path_ + "/file-" + std::to_string(number_++); }

 private:
  std::string path_;
  int number_ = 0;
};

inline Bytes noise(std::size_t size, std::uint64_t seed = 1) {
  Bytes bytes(size + sizeof(std::uint64_t));
  std::uint64_t state = seed * 0x9E3779B97F4A7C15ull + 1;
  for (std::size_t at = 0; at < size; at += sizeof state) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    std::memcpy(bytes.data() + at, &state, sizeof state);
  }
  bytes.resize(size);
  return bytes;
}

Bytes content_of(const std::string& path);

// The error that a call ends with: its errno, 0 for none, -1 for any other exception.
int errno_of(const std::function<void()>& call, const std::string& path);
bool throws_invalid(const std::function<void()>& call);

// What a transfer would return -> what it returns. Any thread.
using Twist = std::function<std::int64_t(bool write, std::uint64_t offset, std::size_t length,
                                         std::int64_t result)>;

class FaultySystem final : public System {
 public:
  Twist twist;
  std::atomic<bool> direct_now{false};  // of the last file that was switched
  int allocate_error = 0;               // -errno, and so on
  int sync_error = 0;
  int close_error = 0;
  int ring_error = 0;
  int direct_error = 0;
  DirectLimits limits{4096, 4096};
  bool memory = false;  // what every file lies in

  int allocate(int fd, std::uint64_t bytes) override;
  int sync(int fd) override;
  int close(int fd) override;
  int set_direct(int fd, bool on) override;
  DirectLimits direct_limits(int fd) override;
  bool in_memory(int fd) override;
  int uring_setup(unsigned entries, void* params) override;
  std::int64_t read(int fd, void* memory, std::size_t length, std::uint64_t offset) override;
  std::int64_t write(int fd, const void* memory, std::size_t length, std::uint64_t offset) override;
  std::int64_t ring_result(bool write, std::uint64_t offset, std::size_t length,
                           std::int64_t result) override;
};

struct Kind {
  Backend backend;
  Direct direct;
};
// Those that this machine has.
const std::vector<Kind>& kinds();
// Small enough that files of some hundred KiB have many requests.
Options small(const Kind& kind);

void test_copies();
void test_transfers();
void test_life();
void test_faults();

}  // namespace goku::io::testing
