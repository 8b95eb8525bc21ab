// What is written is what is read, for every backend, alone and many at a time.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <mutex>
#include <set>
#include <thread>

#include "../crc32c.h"
#include "../probe.h"
#include "check.h"

namespace goku::io::testing {
namespace {

constexpr std::uint64_t kChunk = 4096;

std::vector<std::uint32_t> write_file(Engine& engine, const std::string& path, const Bytes& data,
                                      std::uint64_t piece) {
  auto writer = engine.create(path, data.size(), kChunk, false, 0644);
  for (std::uint64_t at = 0; at < data.size(); at += piece)
    writer->submit(data.data() + at, at, std::min<std::uint64_t>(piece, data.size() - at));
  const auto [size, crc] = writer->finish();
  CHECK(size == data.size());
  CHECK(crc == crc32c(0, data.data(), data.size()));
  return writer->chunk_crcs();
}

void read_back(Engine& engine, const std::string& path, const Bytes& data,
               const std::vector<std::uint32_t>& crcs) {
  // Three columns of eight out of rows of 1,000 bytes, and the last 10,000 bytes.
  const std::uint64_t rows = data.size() / 1000;
  const std::uint64_t tail = std::min<std::uint64_t>(data.size(), 10'000);
  Bytes columns(rows * 3 + 1, 0xA5), end(tail + 1, 0xA5);
  const auto address = [](Bytes& bytes) { return reinterpret_cast<std::int64_t>(bytes.data()); };
  const std::int64_t segments[2][6] = {
      {static_cast<std::int64_t>(data.size() - tail), static_cast<std::int64_t>(tail), 1, 0,
       address(end), 0},
      {8, 3, static_cast<std::int64_t>(rows), 1000, address(columns), 3},
  };
  const ReadStats stats = engine.read(path, segments[0], 2, kChunk, crcs, data.size())->result();
  CHECK(stats.bytes_wanted == tail + rows * 3);
  CHECK(stats.bytes_read <= data.size());
  for (std::uint64_t row = 0; row < rows; ++row)
    CHECK(std::memcmp(columns.data() + row * 3, data.data() + row * 1000 + 8, 3) == 0);
  CHECK(std::memcmp(end.data(), data.data() + data.size() - tail, tail) == 0);
  CHECK(columns.back() == 0xA5 && end.back() == 0xA5);
}

void round_trips(Folder& folder) {
  for (const Kind& kind : kinds()) {
    Engine engine(small(kind));
    for (const std::size_t size : {0, 1, 4095, 4096, 65536, 65537, 700'001, 1 << 21}) {
      const Bytes data = noise(size, size);
      const std::string path = folder.fresh();
      const auto crcs = write_file(engine, path, data, 5 * kChunk);
      CHECK(content_of(path) == data);
      if (size > 0) read_back(engine, path, data, crcs);
      auto checksum = engine.checksum(path, kChunk);
      checksum->result();
      CHECK(checksum->crc() == crc32c(0, data.data(), data.size()));
      CHECK(checksum->chunk_crcs() == crcs);
    }
  }
}

// What lies in pieces of any length, with gaps between, is brought together by several workers.
void gathered(Folder& folder) {
  for (const Kind& kind : kinds()) {
    Engine engine(small(kind));
    for (const std::size_t size : {1, 4096, 65537, 3'000'001}) {
      Bytes data = noise(size, size);
      std::vector<Extent> extents;
      std::vector<Bytes> pieces;
      for (std::size_t at = 0, number = 0; at < size; ++number) {
        const std::size_t length = std::min<std::size_t>(1 + number * number * 37 % 90'001, size - at);
        const auto begin = data.begin() + static_cast<std::ptrdiff_t>(at);
        const auto end = begin + static_cast<std::ptrdiff_t>(length);
        if (number % 5 == 4) {
          std::fill(begin, end, static_cast<unsigned char>(0));
        } else {
          pieces.emplace_back(begin, end);
          extents.push_back({at, length, nullptr});
        }
        at += length;
      }
      for (std::size_t number = 0; number < pieces.size(); ++number)
        extents[number].memory = pieces[number].data();
      const std::string path = folder.fresh();
      auto writer = engine.create(path, size, kChunk, false, 0644);
      writer->wait(writer->gather(extents, 0, size), std::nullopt);
      CHECK(writer->finish().second == crc32c(0, data.data(), size));
      CHECK(content_of(path) == data);
    }
  }
}

// Files in memory are written by no more than two threads of an engine, and read by no more than there are
// processors (2 to 16). Of all of them, where it was told how many threads or how much memory, and on a disk.
void few_at_a_time(Folder& folder) {
  const Bytes data = noise(16 << 20);
  Options plain, threads, budget;
  plain.direct = threads.direct = budget.direct = Direct::off;
  plain.block_bytes = threads.block_bytes = budget.block_bytes = 1 << 16;
  threads.threads = threads.queue_depth = 64;
  budget.memory_budget = 64 << 16;
  struct Case {
    const Options& options;
    bool memory, few;
  };
  for (const Case& one : {Case{plain, true, true}, Case{plain, false, false},
                          Case{threads, true, false}, Case{budget, true, false}}) {
    FaultySystem system;
    system.memory = one.memory;
    std::mutex mutex;
    std::set<std::thread::id> seen[2];
    system.twist = [&](bool write, std::uint64_t, std::size_t, std::int64_t result) {
      {
        const std::lock_guard<std::mutex> lock(mutex);
        seen[write ? 1 : 0].insert(std::this_thread::get_id());
      }
      // The others' turn.
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      return result;
    };
    Engine engine(one.options, system);
    const std::string path = folder.fresh();
    auto writer = engine.create(path, data.size(), kChunk, false, 0644);
    writer->submit(data.data(), 0, data.size());
    writer->finish();
    CHECK(content_of(path) == data);
    auto checksum = engine.checksum(path, kChunk);
    checksum->result();
    CHECK(checksum->crc() == crc32c(0, data.data(), data.size()));
    const std::size_t most =
        std::clamp<std::size_t>(std::thread::hardware_concurrency(), 2, 16);
    CHECK(one.few ? seen[1].size() == 2 : seen[1].size() > 2);
    CHECK(one.few ? seen[0].size() >= 2 && seen[0].size() <= most : seen[0].size() > 2);
  }
}

void many_at_once(Folder& folder) {
  for (const Kind& kind : kinds()) {
    Engine engine(small(kind));
    std::vector<std::string> paths;
    for (int number = 0; number < 6; ++number) paths.push_back(folder.fresh());
    std::vector<std::thread> threads;
    for (std::size_t number = 0; number < paths.size(); ++number) {
      threads.emplace_back([&, number] {
        const Bytes data = noise(300'000 + 4097 * number, number + 1);
        const auto crcs = write_file(engine, paths[number], data, 3 * kChunk);
        for (int again = 0; again < 3; ++again) read_back(engine, paths[number], data, crcs);
      });
    }
    for (auto& thread : threads) thread.join();
  }
}

void one_file_from_many_threads(Folder& folder) {
  for (const Kind& kind : kinds()) {
    Engine engine(small(kind));
    const Bytes data = noise(1 << 21);
    const std::string path = folder.fresh();
    auto writer = engine.create(path, data.size(), kChunk, true, 0644);
    std::atomic<std::uint64_t> next{0};
    std::vector<std::thread> threads;
    for (int number = 0; number < 4; ++number) {
      threads.emplace_back([&] {
        for (;;) {
          const std::uint64_t at = next.fetch_add(7 * kChunk);
          if (at >= data.size()) return;
          const Ticket ticket = writer->submit(
              data.data() + at, at, std::min<std::uint64_t>(7 * kChunk, data.size() - at));
          while (!writer->wait(ticket, 0.001)) {
          }
          CHECK(writer->done(ticket));
        }
      });
    }
    for (auto& thread : threads) thread.join();
    CHECK(writer->finish().second == crc32c(0, data.data(), data.size()));
    CHECK(content_of(path) == data);
  }
}

void probing(Folder& folder) {
  const std::string directory = folder.fresh();
  std::filesystem::create_directory(directory);
  const ProbeResult found = probe(directory, 0.2, 1 << 20, [] { return true; });
  CHECK(!found.trials.empty());
  CHECK(found.trials[found.choice].read_seconds > 0);
  CHECK(std::filesystem::is_empty(directory));
  CHECK(probe(directory, 1.0, 1 << 20, [] { return false; }).trials.empty());

  FaultySystem system;
  system.memory = true;
  const ProbeResult memory = probe(directory, 5.0, 1 << 20, [] { return true; }, system);
  CHECK(memory.trials.size() == 5);
  CHECK(memory.trials[0].own_threads && memory.trials[0].asked.threads == 0);
  for (const Trial& trial : memory.trials) {
    CHECK(trial.error.empty() && trial.read_seconds > 0);
    // Numbers that were given are those that were measured.
    CHECK(trial.own_threads == (trial.asked.queue_depth == 0));
    CHECK(trial.own_threads || trial.options.threads == trial.asked.queue_depth);
  }
  CHECK(std::filesystem::is_empty(directory));
}

void joiner_equals_combine() {
  for (const std::uint64_t size : {0, 1, 4096, 65536, 12345}) {
    const Crc32cJoiner join(size);
    for (std::uint32_t crc = 1; crc < 0x80000000u; crc = crc * 3 + 7)
      CHECK(join(crc, crc ^ 0x55555555u) == crc32c_combine(crc, crc ^ 0x55555555u, size));
  }
}

}  // namespace

void test_transfers() {
  Folder folder;
  joiner_equals_combine();
  round_trips(folder);
  gathered(folder);
  few_at_a_time(folder);
  many_at_once(folder);
  one_file_from_many_threads(folder);
  probing(folder);
}

}  // namespace goku::io::testing
