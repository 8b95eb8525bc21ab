// Page-aligned memory from the system: what O_DIRECT can read and write without a copy.
#pragma once

#include <cstddef>
#include <cstdint>

namespace goku::io {

class Buffer {
 public:
  Buffer() = default;
  // Zeroed, aligned to a page (huge: and from 2 MiB on to 2 MiB, with huge pages where the system
  // gives them out: staging touches every page of gigabytes, and 4 KiB faults halve its speed).
  // Throws std::bad_alloc.
  explicit Buffer(std::size_t bytes, bool huge = true);
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;

  unsigned char* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }

 private:
  void spare_forks();

  unsigned char* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t mapped_ = 0;
};

}  // namespace goku::io
