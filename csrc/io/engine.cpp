#include "engine.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "errors.h"

namespace goku::io {
namespace {

// Measured with 1 GiB on a 2-core virtual machine whose disk (virtio, ext4) does 3.6 to 3.9 GiB/s
// for 8 threads that do nothing but pwrite 4 MiB each and fsync, and 2.6 to 2.8 for pread, with
// preallocation, checksums and fsync, as parts of that rate:
//   write, 4 MiB requests   depth 8: 0.92   16: 0.96   24: 1.02   32: 1.03
//   write, 2 MiB requests                              32: 0.99   64: 1.02
// Writes come from wherever the caller's bytes lie, and like to be large and many: the device is not
// to wait while the threads sum. Reads go through the engine's own memory, one a thread. How many
// they should be changes with the host: while it is quiet, 8 of 1 MiB reach 1.01 of the raw rate,
// and the same in other hours 0.46 to 0.75, where 16 of 2 MiB reach 0.80 to 0.84 by one and by two
// processes, 8 of 4 MiB 0.60 to 0.91, 8 of 2 MiB 0.64 to 0.77.
constexpr std::size_t kBlockBytes = std::size_t{4} << 20;
constexpr std::size_t kReadsPerBlock = 2;
constexpr std::size_t kRingDepth = 32;
constexpr std::size_t kThreads = 16;

// Into a file system that is memory a write is a copy that the thread itself makes, under a lock of
// the file: one thread does that while another sums, and more only take turns on the cores. 1 GiB
// (2 cores, medians of 21): in one file 439 ms with 8 threads, 396 with 2, 478 with one; in two
// files by two processes 308, 287 and 268. Reads from it exclude nobody, and wait for nothing: as
// many threads as processors (by two processes on 2 cores 213 ms with 16, 184 with 8, 165 with 2).
constexpr std::size_t kThreadsIntoMemory = 2;

constexpr std::size_t kDeepest = 4096;
constexpr std::size_t kSmallestBlock = std::size_t{64} << 10;
constexpr std::size_t kLargestBlock = std::size_t{1} << 30;
constexpr std::size_t kMostThreads = 256;

void check_range(const char* what, std::uint64_t value, std::uint64_t least, std::uint64_t most,
                 bool zero_allowed) {
  if ((zero_allowed && value == 0) || (value >= least && value <= most)) return;
  throw std::invalid_argument(std::string(what) + " is " + std::to_string(value) + "; allowed is " +
                              (zero_allowed ? "0 (the default) or " : "") + std::to_string(least) +
                              " to " + std::to_string(most));
}

void check_chunk(std::uint64_t chunk) {
  check_range("chunk", chunk, kSmallestChunk, kLargestChunk, false);
  if (chunk % kAlignment != 0) {
    throw std::invalid_argument("chunk is " + std::to_string(chunk) +
                                "; allowed are multiples of " + std::to_string(kAlignment));
  }
}

Options checked(Options options) {
  check_range("queue_depth", options.queue_depth, 1, kDeepest, true);
  check_range("block_bytes", options.block_bytes, kSmallestBlock, kLargestBlock, true);
  check_range("threads", options.threads, 1, kMostThreads, true);
  if (options.block_bytes == 0) options.block_bytes = kBlockBytes;
  if (options.block_bytes % kAlignment != 0) {
    throw std::invalid_argument("block_bytes is " + std::to_string(options.block_bytes) +
                                "; allowed are multiples of " + std::to_string(kAlignment));
  }
  if (options.memory_budget != 0 && options.memory_budget < options.block_bytes) {
    throw std::invalid_argument("memory_budget is " + std::to_string(options.memory_budget) +
                                "; allowed is 0 (no limit) or at least a block, " +
                                std::to_string(options.block_bytes));
  }
  return options;
}

std::size_t within_budget(const Options& options, std::size_t depth) {
  if (options.memory_budget == 0) return depth;
  return std::min(depth, options.memory_budget / options.block_bytes);
}

}  // namespace

const char* name(Backend backend) noexcept {
  return backend == Backend::io_uring  ? "io_uring"
         : backend == Backend::threads ? "threads"
                                       : "auto";
}

const char* name(Direct direct) noexcept {
  return direct == Direct::on ? "on" : direct == Direct::off ? "off" : "auto";
}

// ---- core ----

Core::Core(const Options& options, System& sys)
    : system(sys),
      chosen(checked(options)),
      wanted(options.backend),
      trace(std::make_shared<Trace>(options.trace)),
      process_(::getpid()),
      may_choose_(options.threads == 0 && options.queue_depth == 0 && options.memory_budget == 0) {
  if (wanted != Backend::threads) {
    const std::size_t depth =
        within_budget(chosen, chosen.queue_depth != 0 ? chosen.queue_depth : kRingDepth);
    const std::size_t threads =
        std::min(depth, chosen.threads != 0 ? chosen.threads : kThreads);
    int error = 0;
    std::vector<std::unique_ptr<Ring>> rings;
    while (error == 0 && rings.size() < threads) {
      const std::size_t share = Pool::ring_depth(depth, threads);
      auto ring = Ring::open(system, static_cast<unsigned>(share), &error);
      if (ring != nullptr) rings.push_back(std::move(ring));
    }
    if (error == 0) {
      pool = std::make_unique<Pool>(system, depth, chosen.block_bytes, threads, std::move(rings));
      chosen.backend = Backend::io_uring;
      chosen.queue_depth = depth;
      chosen.threads = threads;
      return;
    }
    if (wanted == Backend::io_uring) throw IoError(error, "io_uring");
    reason = std::string("io_uring_setup: ") + std::strerror(error);
  }
  // A thread holds one request from its checksum to its end.
  std::size_t threads = chosen.queue_depth != 0 ? chosen.queue_depth : chosen.threads;
  if (chosen.queue_depth != 0 && chosen.threads != 0)
    threads = std::min(chosen.queue_depth, chosen.threads);
  threads = within_budget(chosen, std::min(threads != 0 ? threads : kThreads, kMostThreads));
  pool = std::make_unique<Pool>(system, threads, chosen.block_bytes, threads,
                                std::vector<std::unique_ptr<Ring>>());
  chosen.backend = Backend::threads;
  chosen.queue_depth = chosen.threads = threads;
}

Core::~Core() { close(); }

bool Core::foreign() const noexcept { return ::getpid() != process_; }

void Core::check() const {
  if (foreign()) {
    throw std::runtime_error("an engine of process " + std::to_string(process_) +
                             " was used in process " + std::to_string(::getpid()) +
                             ": its threads are not copied by fork(); make an engine of its own");
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) throw std::runtime_error("the engine is closed");
}

void Core::enlist(const std::shared_ptr<Source>& source) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) throw std::runtime_error("the engine is closed");
  sources_.erase(std::remove_if(sources_.begin(), sources_.end(),
                                [](const auto& one) { return one.expired(); }),
                 sources_.end());
  sources_.push_back(source);
}

void Core::close() {
  // The second of two waits until the first has cancelled everything: threads that stop under a
  // request would never end it.
  const std::lock_guard<std::mutex> alone(closing_);
  std::vector<std::weak_ptr<Source>> sources;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    sources.swap(sources_);
  }
  for (const auto& one : sources) {
    if (const auto source = one.lock()) source->cancel();
  }
  if (pool != nullptr) pool->stop();
  if (into_memory_ != nullptr) into_memory_->stop();
  if (from_memory_ != nullptr) from_memory_->stop();
}

Pool& Core::writing(const File& file) {
  if (!may_choose_ || !file.in_memory()) return *pool;
  return own(&into_memory_, kThreadsIntoMemory, chosen.block_bytes);
}

Pool& Core::reading(const File& file) {
  if (!may_choose_ || !file.in_memory()) return *pool;
  const std::size_t processors = std::thread::hardware_concurrency();
  return own(&from_memory_, std::clamp<std::size_t>(processors, 2, kThreads),
             chosen.block_bytes / kReadsPerBlock);
}

Pool& Core::own(std::unique_ptr<Pool>* place, std::size_t threads, std::size_t block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) throw std::runtime_error("the engine is closed");
  if (*place == nullptr) {
    try {
      *place = std::make_unique<Pool>(system, threads, block, threads,
                                      std::vector<std::unique_ptr<Ring>>());
    } catch (const std::system_error&) {  // no more threads: those that there are do, too
      return *pool;
    } catch (const std::bad_alloc&) {
      return *pool;
    }
  }
  return **place;
}

std::size_t Core::write_block(std::uint64_t chunk) const {
  if (chosen.memory_budget != 0 && chunk > chosen.memory_budget) {
    throw std::invalid_argument("chunk is " + std::to_string(chunk) + ", memory_budget " +
                                std::to_string(chosen.memory_budget) +
                                ": a chunk is read whole, into memory of that budget");
  }
  const auto bytes = static_cast<std::size_t>(chunk);
  return std::max(chosen.block_bytes / bytes * bytes, bytes);
}

std::size_t Core::read_block(std::uint64_t chunk) const {
  const auto bytes = static_cast<std::size_t>(chunk);
  return std::min(write_block(chunk),
                  std::max(chosen.block_bytes / kReadsPerBlock / bytes * bytes, bytes));
}

// ---- engine ----

Engine::Engine(const Options& options, System& system)
    : core_(std::make_shared<Core>(options, system)) {}

Engine::~Engine() {
  if (core_->foreign()) {
    new std::shared_ptr<Core>(std::move(core_));  // see Handle
  } else {
    core_->close();
  }
}

void Engine::close() {
  if (core_->foreign()) core_->check();
  core_->close();
}

Handle<Writer> Engine::create(const std::string& path, std::uint64_t size, std::uint64_t chunk,
                              bool sync, unsigned mode) {
  core_->check();
  check_chunk(chunk);
  core_->write_block(chunk);  // before there is a file
  return write(File::create(core_->system, core_->trace, path, size, core_->chosen.direct, mode),
               size, chunk, sync);
}

Handle<Writer> Engine::write(std::unique_ptr<File> file, std::uint64_t size, std::uint64_t chunk,
                             bool sync) {
  Pool& pool = core_->writing(*file);
  auto writer =
      std::make_shared<Writer>(pool, std::move(file), size, static_cast<std::uint32_t>(chunk),
                               core_->write_block(chunk), sync);
  core_->enlist(writer);
  return {core_, std::move(writer)};
}

Handle<Reader> Engine::read(const std::string& path, const std::int64_t* segments,
                            std::size_t count, std::uint64_t chunk,
                            std::optional<std::vector<std::uint32_t>> crcs, std::uint64_t size) {
  core_->check();
  check_chunk(chunk);
  const std::uint64_t chunks = (size + chunk - 1) / chunk;
  if (crcs && crcs->size() != chunks) {
    throw std::invalid_argument("crcs are " + std::to_string(crcs->size()) + "; a file of " +
                                std::to_string(size) + " bytes has " + std::to_string(chunks) +
                                " chunks");
  }
  // Without checksums there is no need to read whole chunks.
  const std::uint64_t unit = crcs ? chunk : kAlignment;
  ReadPlan plan(read_segments(segments, count, size), unit, core_->read_block(unit), size);
  auto file = File::open(core_->system, core_->trace, path, core_->chosen.direct);
  const std::uint64_t found = file->size();
  if (found != size) {
    throw std::invalid_argument(path + " has " + std::to_string(found) + " bytes; expected were " +
                                std::to_string(size));
  }
  Pool& pool = core_->reading(*file);
  auto reader =
      std::make_shared<Reader>(pool, std::move(file), size, static_cast<std::uint32_t>(chunk),
                               std::move(plan), std::move(crcs));
  core_->enlist(reader);
  reader->start();
  return {core_, std::move(reader)};
}

Handle<Reader> Engine::checksum(const std::string& path, std::uint64_t chunk) {
  core_->check();
  return checksum(File::open(core_->system, core_->trace, path, core_->chosen.direct), chunk);
}

Handle<Reader> Engine::checksum(std::unique_ptr<File> file, std::uint64_t chunk) {
  check_chunk(chunk);
  const std::uint64_t size = file->size();
  Pool& pool = core_->reading(*file);
  auto reader = std::make_shared<Reader>(pool, std::move(file), size,
                                         static_cast<std::uint32_t>(chunk),
                                         core_->read_block(chunk));
  core_->enlist(reader);
  reader->start();
  return {core_, std::move(reader)};
}

}  // namespace goku::io
