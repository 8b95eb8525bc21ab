#include "check.h"

#include <fstream>

namespace goku::io::testing {

Bytes content_of(const std::string& path) {
  Bytes bytes(std::filesystem::file_size(path));
  std::ifstream file(path, std::ios::binary);
  file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  CHECK(file.gcount() == static_cast<std::streamsize>(bytes.size()));
  return bytes;
}

int errno_of(const std::function<void()>& call, const std::string& path) {
  try {
    call();
  } catch (const IoError& error) {
    CHECK(error.path() == path);
    CHECK(error.code() > 0);
    return error.code();
  } catch (const std::exception&) {
    return -1;
  }
  return 0;
}

bool throws_invalid(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

int FaultySystem::allocate(int fd, std::uint64_t bytes) {
  return allocate_error != 0 ? allocate_error : System::allocate(fd, bytes);
}

int FaultySystem::sync(int fd) { return sync_error != 0 ? sync_error : System::sync(fd); }

int FaultySystem::close(int fd) {
  const int result = System::close(fd);
  return close_error != 0 ? close_error : result;
}

int FaultySystem::set_direct(int fd, bool on) {
  const int result = on && direct_error != 0 ? direct_error : System::set_direct(fd, on);
  if (result == 0) direct_now = on;
  return result;
}

DirectLimits FaultySystem::direct_limits(int) { return limits; }

bool FaultySystem::in_memory(int fd) { return memory || System::in_memory(fd); }

int FaultySystem::uring_setup(unsigned entries, void* params) {
  return ring_error != 0 ? ring_error : System::uring_setup(entries, params);
}

std::int64_t FaultySystem::read(int fd, void* memory, std::size_t length, std::uint64_t offset) {
  const std::int64_t result = System::read(fd, memory, length, offset);
  return twist ? twist(false, offset, length, result) : result;
}

std::int64_t FaultySystem::write(int fd, const void* memory, std::size_t length,
                                 std::uint64_t offset) {
  const std::int64_t result = System::write(fd, memory, length, offset);
  return twist ? twist(true, offset, length, result) : result;
}

std::int64_t FaultySystem::ring_result(bool write, std::uint64_t offset, std::size_t length,
                                       std::int64_t result) {
  return twist ? twist(write, offset, length, result) : result;
}

const std::vector<Kind>& kinds() {
  static const std::vector<Kind> here = [] {
    std::vector<Kind> all;
    for (const Backend backend : {Backend::threads, Backend::io_uring}) {
      for (const Direct direct : {Direct::automatic, Direct::off}) {
        try {
          Engine engine(small({backend, direct}));
          all.push_back({backend, direct});
        } catch (const IoError& error) {
          std::printf("without %s: %s\n", name(backend), error.what());
        }
      }
    }
    return all;
  }();
  return here;
}

Options small(const Kind& kind) {
  Options options;
  options.backend = kind.backend;
  options.direct = kind.direct;
  options.block_bytes = 65536;
  options.queue_depth = 4;
  options.threads = kind.backend == Backend::threads ? 4 : 2;
  return options;
}

}  // namespace goku::io::testing
