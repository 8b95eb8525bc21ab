#include "segments.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace goku::io {
namespace {

constexpr std::size_t kColumns = 6;
constexpr const char* kNames[kColumns] = {"offset",      "row_bytes", "rows",
                                          "file_stride", "address",   "memory_stride"};

struct Span {
  std::uint64_t begin;
  std::uint64_t end;
};

// Rows of a segment that have a byte in [begin, end): [first, last).
struct Rows {
  std::uint64_t first;
  std::uint64_t last;
};

Rows rows_within(const Segment& segment, std::uint64_t begin, std::uint64_t end) {
  Rows rows{0, 0};
  const std::uint64_t first_end = segment.offset + segment.row_bytes;
  if (begin >= first_end) rows.first = (begin - first_end) / segment.file_stride + 1;
  if (end > segment.offset) rows.last = (end - segment.offset - 1) / segment.file_stride + 1;
  rows.last = std::min(rows.last, segment.rows);
  return rows;
}

void check(const Segment& segment, std::size_t index, std::uint64_t file_size) {
  const auto refuse = [index](const std::string& what) {
    throw std::invalid_argument("segment " + std::to_string(index) + ": " + what);
  };
  if (segment.rows > 1) {
    if (segment.file_stride < segment.row_bytes) {
      refuse("file_stride is " + std::to_string(segment.file_stride) + "; allowed is row_bytes, " +
             std::to_string(segment.row_bytes) + ", and above");
    }
    if (segment.memory_stride < segment.row_bytes) {
      refuse("memory_stride is " + std::to_string(segment.memory_stride) +
             "; allowed is row_bytes, " + std::to_string(segment.row_bytes) + ", and above");
    }
  }
  if (segment.address == 0) refuse("address is 0");
  // In this order no step overflows.
  const std::uint64_t room = segment.offset > file_size ? 0 : file_size - segment.offset;
  if (segment.offset > file_size || segment.row_bytes > room ||
      (segment.rows > 1 && segment.rows - 1 > (room - segment.row_bytes) / segment.file_stride)) {
    refuse("offset " + std::to_string(segment.offset) + ", row_bytes " +
           std::to_string(segment.row_bytes) + ", rows " + std::to_string(segment.rows) +
           ", file_stride " + std::to_string(segment.file_stride) + "; the file has " +
           std::to_string(file_size) + " bytes");
  }
}

void touch(const Segment& segment, std::uint64_t unit, std::uint64_t file_size,
           std::vector<Span>* spans) {
  const auto add = [&](std::uint64_t begin, std::uint64_t end) {
    begin = begin / unit * unit;
    end = end > file_size - (file_size - 1) % unit - 1 ? file_size : (end + unit - 1) / unit * unit;
    if (!spans->empty() && begin >= spans->back().begin && begin <= spans->back().end) {
      spans->back().end = std::max(spans->back().end, end);
    } else {
      spans->push_back({begin, end});
    }
  };
  // Rows that begin no further apart than a unit leave none out.
  if (segment.rows == 1 || segment.file_stride <= unit) {
    add(segment.offset, segment.end());
    return;
  }
  for (std::uint64_t row = 0; row < segment.rows; ++row) {
    const std::uint64_t begin = segment.offset + row * segment.file_stride;
    add(begin, begin + segment.row_bytes);
  }
}

}  // namespace

std::vector<Segment> read_segments(const std::int64_t* values, std::size_t count,
                                   std::uint64_t file_size) {
  std::vector<Segment> segments;
  segments.reserve(count);
  for (std::size_t index = 0; index < count; ++index) {
    const std::int64_t* const row = values + index * kColumns;
    for (std::size_t column = 0; column < kColumns; ++column) {
      if (row[column] < 0) {
        throw std::invalid_argument("segment " + std::to_string(index) + ": " + kNames[column] +
                                    " is " + std::to_string(row[column]) +
                                    "; allowed is 0 and above");
      }
    }
    const auto value = [row](std::size_t column) {
      return static_cast<std::uint64_t>(row[column]);
    };
    Segment segment{value(0), value(1), value(2), value(3), value(4), value(5)};
    if (segment.row_bytes == 0 || segment.rows == 0) continue;
    check(segment, index, file_size);
    if (segment.file_stride == segment.row_bytes && segment.memory_stride == segment.row_bytes) {
      segment.row_bytes *= segment.rows;
      segment.rows = 1;
    }
    // Never walked, but divided by.
    if (segment.rows == 1) segment.file_stride = segment.memory_stride = segment.row_bytes;
    segments.push_back(segment);
  }
  if (segments.size() > std::numeric_limits<std::uint32_t>::max()) {
    throw std::invalid_argument("segments are " + std::to_string(segments.size()) +
                                "; allowed are up to 4294967295");
  }
  std::stable_sort(segments.begin(), segments.end(),
                   [](const Segment& a, const Segment& b) { return a.offset < b.offset; });
  return segments;
}

ReadPlan::ReadPlan(std::vector<Segment> segments, std::uint64_t unit, std::uint64_t most,
                   std::uint64_t file_size)
    : segments_(std::move(segments)) {
  std::vector<Span> spans;
  for (const Segment& segment : segments_) {
    touch(segment, unit, file_size, &spans);
    wanted_ += segment.row_bytes * segment.rows;
  }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  std::size_t kept = 0;
  for (std::size_t index = 1; index < spans.size(); ++index) {
    if (spans[index].begin <= spans[kept].end) {
      spans[kept].end = std::max(spans[kept].end, spans[index].end);
    } else {
      spans[++kept] = spans[index];
    }
  }
  if (!spans.empty()) spans.resize(kept + 1);
  for (const Span& span : spans) {
    for (std::uint64_t begin = span.begin; begin < span.end; begin += most)
      stretches_.push_back({begin, std::min(begin + most, span.end), 0});
  }
  find_wishes();
}

void ReadPlan::find_wishes() {
  // Twice over the same pairs: to count, then to fill in.
  const auto each = [this](auto&& use) {
    for (std::size_t number = 0; number < segments_.size(); ++number) {
      const Segment& segment = segments_[number];
      auto at = std::upper_bound(
          stretches_.begin(), stretches_.end(), segment.offset,
          [](std::uint64_t place, const Stretch& stretch) { return place < stretch.end; });
      for (; at != stretches_.end() && at->begin < segment.end(); ++at) {
        const Rows rows = rows_within(segment, at->begin, at->end);
        if (rows.first < rows.last)
          use(static_cast<std::size_t>(at - stretches_.begin()),
              static_cast<std::uint32_t>(number));
      }
    }
  };
  std::vector<std::size_t> counts(stretches_.size() + 1, 0);
  each([&](std::size_t index, std::uint32_t) { ++counts[index + 1]; });
  for (std::size_t index = 0; index < stretches_.size(); ++index) {
    counts[index + 1] += counts[index];
    stretches_[index].first_wish = counts[index];
  }
  wishes_.resize(counts.back());
  std::vector<std::size_t> next(counts.begin(), counts.end() - 1);
  each([&](std::size_t index, std::uint32_t number) { wishes_[next[index]++] = number; });
}

std::uint64_t ReadPlan::scatter(std::size_t index, const unsigned char* memory) const {
  const Stretch& stretch = stretches_[index];
  const std::size_t last =
      index + 1 < stretches_.size() ? stretches_[index + 1].first_wish : wishes_.size();
  std::uint64_t copied = 0;
  for (std::size_t wish = stretch.first_wish; wish < last; ++wish) {
    const Segment& segment = segments_[wishes_[wish]];
    const Rows rows = rows_within(segment, stretch.begin, stretch.end);
    for (std::uint64_t row = rows.first; row < rows.last; ++row) {
      const std::uint64_t row_begin = segment.offset + row * segment.file_stride;
      const std::uint64_t begin = std::max(row_begin, stretch.begin);
      const std::uint64_t end = std::min(row_begin + segment.row_bytes, stretch.end);
      auto* const target = reinterpret_cast<unsigned char*>(
          static_cast<std::uintptr_t>(segment.address + row * segment.memory_stride));
      std::memcpy(target + (begin - row_begin), memory + (begin - stretch.begin), end - begin);
      copied += end - begin;
    }
  }
  return copied;
}

}  // namespace goku::io
