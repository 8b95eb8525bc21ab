// Calls that fail, stop short or are interrupted: what is raised, and what the file then holds.
#include <errno.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "../crc32c.h"
#include "check.h"

namespace goku::io::testing {
namespace {

constexpr std::uint64_t kChunk = 4096;
constexpr std::size_t kSize = 700'001;

struct Written {
  std::string path;
  int error;  // what finish() raised
  bool direct;
};

Written write_file(System& system, const Kind& kind, const std::string& path, const Bytes& data,
                   bool trace = false) {
  Options options = small(kind);
  options.trace = trace;
  Engine engine(options, system);
  auto writer = engine.create(path, data.size(), kChunk, true, 0644);
  writer->submit(data.data(), 0, data.size());
  const int error = errno_of([&] { writer->finish(); }, path);
  if (error == 0) {
    CHECK(writer->finish().second == crc32c(0, data.data(), data.size()));
    CHECK(content_of(path) == data);
    // The trace is the file, without a gap or an overlap, however often it was cut.
    if (trace) {
      std::uint64_t bytes = 0;
      for (const Event& event : engine.events()) {
        if (std::strcmp(event.operation, "write") == 0) bytes += event.length;
      }
      CHECK(bytes >= data.size());
    }
  } else {
    // Whoever comes later hears the same.
    CHECK(errno_of([&] { writer->finish(); }, path) == error);
    CHECK(errno_of([&] { writer->chunk_crcs(); }, path) == error);
  }
  return {path, error, writer->direct()};
}

void one_transfer_fails(Folder& folder) {
  const Bytes data = noise(kSize);
  for (const Kind& kind : kinds()) {
    for (const int code : {EIO, ENOSPC, EDQUOT}) {
      for (const int which : {0, 3, 9}) {
        FaultySystem system;
        std::atomic<int> count{0};
        system.twist = [&](bool write, std::uint64_t, std::size_t, std::int64_t result) {
          return write && count++ == which ? -static_cast<std::int64_t>(code) : result;
        };
        CHECK(write_file(system, kind, folder.fresh(), data).error == code);
      }
    }
  }
}

// Ways to stop short. The transfer itself was whole; what is said to be missing is done again.
void transfers_stop_short(Folder& folder) {
  const Bytes data = noise(kSize);
  for (const Kind& kind : kinds()) {
    for (const std::int64_t most : {100, 4096, 5000, 40'000}) {
      FaultySystem system;
      system.twist = [&](bool, std::uint64_t, std::size_t length, std::int64_t result) {
        // One that is refused again and again counts as failed: the first of each kind is cut.
        if (result > most && (most >= 4096 || length % 65536 == 0)) return most;
        return result;
      };
      const Written written = write_file(system, kind, folder.fresh(), data, true);
      // Less than a block of the disk is no progress for O_DIRECT: tried again, then an error.
      const bool stuck = most < 4096 && written.direct;
      CHECK(written.error == (stuck ? EIO : 0));
    }
  }
}

void interrupted(Folder& folder) {
  const Bytes data = noise(kSize);
  for (const Kind& kind : kinds()) {
    for (const int code : {EINTR, EAGAIN}) {
      FaultySystem system;
      std::atomic<int> count{0};
      system.twist = [&](bool, std::uint64_t, std::size_t, std::int64_t result) {
        return count++ % 3 != 0 ? -static_cast<std::int64_t>(code) : result;
      };
      CHECK(write_file(system, kind, folder.fresh(), data).error == 0);
      system.twist = [&](bool, std::uint64_t, std::size_t, std::int64_t) {
        return -static_cast<std::int64_t>(code);
      };
      CHECK(write_file(system, kind, folder.fresh(), data).error == code);
    }
    FaultySystem nothing;
    nothing.twist = [](bool, std::uint64_t, std::size_t, std::int64_t) { return 0; };
    CHECK(write_file(nothing, kind, folder.fresh(), data).error == EIO);
  }
}

// A file system that takes the flag, and refuses the requests.
void direct_requests_are_refused(Folder& folder) {
  const Bytes data = noise(kSize);
  for (Kind kind : kinds()) {
    if (kind.direct == Direct::off) continue;
    FaultySystem system;
    system.twist = [&](bool, std::uint64_t, std::size_t, std::int64_t result) {
      return system.direct_now ? -static_cast<std::int64_t>(EINVAL) : result;
    };
    Written written = write_file(system, kind, folder.fresh(), data);
    CHECK(written.error == 0 && !written.direct);
    {
      Engine engine(small(kind), system);
      auto checksum = engine.checksum(written.path, kChunk);
      checksum->result();
      CHECK(checksum->crc() == crc32c(0, data.data(), data.size()));
    }
    // Asked for by name it is an error; so is the flag that is not taken, and a disk with blocks
    // that are too large.
    kind.direct = Direct::on;
    CHECK(write_file(system, kind, folder.fresh(), data).error == EINVAL);
    Engine engine(small(kind), system);
    const std::string path = folder.fresh();
    system.direct_error = -EINVAL;
    CHECK(errno_of([&] { engine.create(path, 10, kChunk, true, 0644); }, path) == EINVAL);
    system.direct_error = 0;
    system.limits = {4096, 65536};
    const std::string other = folder.fresh();
    CHECK(errno_of([&] { engine.create(other, 10, kChunk, true, 0644); }, other) == EINVAL);
    kind.direct = Direct::automatic;
    system.direct_now = false;
    written = write_file(system, kind, folder.fresh(), data);
    CHECK(written.error == 0 && !written.direct);
  }
}

void the_calls_around(Folder& folder) {
  const Bytes data = noise(kSize);
  for (const Kind& kind : kinds()) {
    FaultySystem system;
    Engine engine(small(kind), system);
    // Full before the first byte: the empty file is the caller's to remove.
    system.allocate_error = -ENOSPC;
    const std::string full = folder.fresh();
    CHECK(errno_of([&] { engine.create(full, kSize, kChunk, true, 0644); }, full) == ENOSPC);
    CHECK(content_of(full).empty() && std::filesystem::exists(full));
    // No preallocation: the size alone.
    system.allocate_error = -EOPNOTSUPP;
    CHECK(write_file(system, kind, folder.fresh(), data).error == 0);
    system.allocate_error = 0;
    system.sync_error = -EIO;
    CHECK(write_file(system, kind, folder.fresh(), data).error == EIO);
    system.sync_error = 0;
    system.close_error = -EDQUOT;
    CHECK(write_file(system, kind, folder.fresh(), data).error == EDQUOT);
    system.close_error = 0;
    CHECK(write_file(system, kind, folder.fresh(), data).error == 0);
  }
}

void a_ring_is_refused(Folder& folder) {
  FaultySystem system;
  for (const int code : {EPERM, ENOSYS, ENOMEM}) {
    system.ring_error = -code;
    {
      Engine engine(small({Backend::automatic, Direct::automatic}), system);
      CHECK(engine.chosen().backend == Backend::threads);
      CHECK(engine.core().reason.find(std::strerror(code)) != std::string::npos);
    }
    CHECK(errno_of([&] { Engine engine(small({Backend::io_uring, Direct::off}), system); },
                   "io_uring") == code);
    const Bytes data = noise(kSize);
    CHECK(write_file(system, {Backend::automatic, Direct::automatic}, folder.fresh(), data).error ==
          0);
  }
}

void reads_fail(Folder& folder) {
  const Bytes data = noise(kSize);
  for (const Kind& kind : kinds()) {
    FaultySystem system;
    const std::string path = write_file(system, kind, folder.fresh(), data).path;
    Engine engine(small(kind), system);
    auto whole = engine.checksum(path, kChunk);
    whole->result();
    const std::vector<std::uint32_t> crcs = whole->chunk_crcs();
    Bytes out(kSize);
    const std::int64_t segment[6] = {
        0, kSize, 1, 0, static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(out.data())), 0};
    const auto read = [&] { engine.read(path, segment, 1, kChunk, crcs, kSize)->result(); };

    for (const std::int64_t most : {4096, 5000, 40'000}) {
      // A direct read that stops at an odd place has met the file's end: cut at whole blocks there.
      system.twist = [&](bool, std::uint64_t, std::size_t, std::int64_t result) {
        const std::int64_t cut = system.direct_now ? most / 4096 * 4096 : most;
        return std::min(result, cut);
      };
      std::fill(out.begin(), out.end(), 0);
      read();
      CHECK(out == data);
    }
    std::atomic<int> count{0};
    system.twist = [&](bool, std::uint64_t, std::size_t, std::int64_t result) {
      return count++ % 2 == 0 ? -static_cast<std::int64_t>(EINTR) : result;
    };
    std::fill(out.begin(), out.end(), 0);
    read();
    CHECK(out == data);

    count = 0;
    system.twist = [&](bool, std::uint64_t, std::size_t, std::int64_t result) {
      return count++ == 5 ? -static_cast<std::int64_t>(EIO) : result;
    };
    CHECK(errno_of(read, path) == EIO);

    // Cut off by somebody while it was read.
    system.twist = [&](bool, std::uint64_t offset, std::size_t, std::int64_t result) {
      return offset >= 400'000 ? 0 : result;
    };
    CHECK(throws_invalid(read));
    system.twist = nullptr;
    read();
  }
}

// What came from the disk is checked, and what is bad is not copied out.
void damaged_reads(Folder& folder) {
  const Bytes data = noise(kSize);
  for (const Kind& kind : kinds()) {
    Engine engine(small(kind));
    FaultySystem system;
    const std::string path = write_file(system, kind, folder.fresh(), data).path;
    auto whole = engine.checksum(path, kChunk);
    whole->result();
    std::vector<std::uint32_t> crcs = whole->chunk_crcs();
    crcs[100] ^= 1;
    crcs[70] ^= 1;
    crcs[170] ^= 1;  // the last, shorter one
    Bytes out(kSize, 0xA5);
    const std::int64_t segment[6] = {
        0, kSize, 1, 0, static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(out.data())), 0};
    for (int again = 0; again < 20; ++again) {
      bool raised = false;
      try {
        engine.read(path, segment, 1, kChunk, crcs, kSize)->result();
      } catch (const ChunkError& error) {
        raised = true;
        CHECK(error.path() == path);
        CHECK(error.chunk().offset == 70 * kChunk && error.chunk().length == kChunk);
        CHECK(error.chunk().wanted == crcs[70] && error.chunk().found == (crcs[70] ^ 1));
      }
      CHECK(raised);
    }
    const Bytes untouched(kChunk, 0xA5);
    CHECK(std::memcmp(out.data() + 70 * kChunk, untouched.data(), kChunk) == 0);
  }
}

}  // namespace

void test_faults() {
  Folder folder;
  one_transfer_fails(folder);
  transfers_stop_short(folder);
  interrupted(folder);
  direct_requests_are_refused(folder);
  the_calls_around(folder);
  a_ring_is_refused(folder);
  reads_fail(folder);
  damaged_reads(folder);
}

}  // namespace goku::io::testing
