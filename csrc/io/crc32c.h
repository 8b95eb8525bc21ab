// CRC-32C (Castagnoli), the checksum of iSCSI (RFC 3720) and of most storage formats.
//
// Polynomial 0x1EDC6F41, reflected (0x82F63B78), initial value and final xor 0xFFFFFFFF. All
// functions take and return finished values, so that crc32c(b, crc32c(a)) is the value of a
// followed by b and the value of nothing is 0.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace goku::io {

// Slicing by 8, in plain C++ on any processor. About 2 GiB/s.
std::uint32_t crc32c_portable(std::uint32_t crc, const void* data, std::size_t size) noexcept;

// The fastest way that this processor has, chosen at run time.
std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t size) noexcept;

// The value of A followed by B from crc32c(A), crc32c(B) and B's length in bytes, in O(log length).
std::uint32_t crc32c_combine(std::uint32_t crc_a, std::uint32_t crc_b,
                             std::uint64_t size_b) noexcept;

// crc32c_combine for many pieces of one length: what the length asks for is worked out once, and a
// combination is four table look-ups (a file of 1 TiB has 16 million chunks).
class Crc32cJoiner {
 public:
  explicit Crc32cJoiner(std::uint64_t size_b) noexcept;
  std::uint32_t operator()(std::uint32_t crc_a, std::uint32_t crc_b) const noexcept;

 private:
  std::array<std::array<std::uint32_t, 256>, 4> shift_;
};

// What crc32c() runs here: "sse4.2", "armv8" or "portable".
const char* crc32c_implementation() noexcept;

}  // namespace goku::io
