// What the engine throws. bindings turns them into OSError, ChunkError and ValueError
// (std::invalid_argument).
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace goku::io {

// A system call that failed; `code` is its errno, never 0.
class IoError : public std::runtime_error {
 public:
  IoError(int code, std::string path)
      : std::runtime_error(std::string(std::strerror(code)) + ": " + path),
        code_(code),
        path_(std::move(path)) {}
  int code() const noexcept { return code_; }
  const std::string& path() const noexcept { return path_; }

 private:
  int code_;
  std::string path_;
};

// A chunk whose bytes do not have the checksum that they were written with.
struct BadChunk {
  std::uint64_t offset = 0;
  std::uint64_t length = 0;
  std::uint32_t wanted = 0;
  std::uint32_t found = 0;
};

class ChunkError : public std::runtime_error {
 public:
  ChunkError(const BadChunk& chunk, const std::string& path)
      : std::runtime_error(path + " is damaged: bytes " + std::to_string(chunk.offset) + " to " +
                           std::to_string(chunk.offset + chunk.length - 1) + " have CRC-32C " +
                           std::to_string(chunk.found) + ", written was " +
                           std::to_string(chunk.wanted)),
        chunk_(chunk),
        path_(path) {}
  const BadChunk& chunk() const noexcept { return chunk_; }
  const std::string& path() const noexcept { return path_; }

 private:
  BadChunk chunk_;
  std::string path_;
};

}  // namespace goku::io
