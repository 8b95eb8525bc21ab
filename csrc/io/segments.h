// Which bytes of a file are wanted, and where in memory they go.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace goku::io {

// Row r is file bytes [offset + r * file_stride, + row_bytes) and goes to memory at
// address + r * memory_stride. A box of a row-major array is such rows.
struct Segment {
  std::uint64_t offset;
  std::uint64_t row_bytes;
  std::uint64_t rows;
  std::uint64_t file_stride;
  std::uint64_t address;
  std::uint64_t memory_stride;

  std::uint64_t end() const { return offset + (rows - 1) * file_stride + row_bytes; }
};

// From rows of six integers. Checked against the file's size (throws std::invalid_argument with the
// segment's number), empty ones left out, sorted by their place in the file.
std::vector<Segment> read_segments(const std::int64_t* values, std::size_t count,
                                   std::uint64_t file_size);

// A stretch of the file that is read by one request, and the segments that want some of it.
struct Stretch {
  std::uint64_t begin;
  std::uint64_t end;
  std::size_t first_wish;  // up to the next stretch's
};

// What has to be read, in the file's order: every `unit` of the file that holds a wanted byte,
// once, in stretches of at most `most` bytes (a multiple of `unit`).
class ReadPlan {
 public:
  ReadPlan(std::vector<Segment> segments, std::uint64_t unit, std::uint64_t most,
           std::uint64_t file_size);

  std::size_t stretches() const noexcept { return stretches_.size(); }
  const Stretch& stretch(std::size_t index) const { return stretches_[index]; }
  std::uint64_t wanted() const noexcept { return wanted_; }  // bytes of all segments
  // Copies what the segments want of a stretch to where they want it; returns the bytes copied.
  std::uint64_t scatter(std::size_t index, const unsigned char* memory) const;

 private:
  void find_wishes();

  std::vector<Segment> segments_;
  std::vector<Stretch> stretches_;
  std::vector<std::uint32_t> wishes_;  // numbers of segments, by stretch
  std::uint64_t wanted_ = 0;
};

}  // namespace goku::io
