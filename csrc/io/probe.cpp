#include "probe.h"

#include <errno.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "buffer.h"
#include "errors.h"

namespace goku::io {
namespace {

constexpr std::uint64_t kChunk = 65536;
// Submitted at one place of the file after the other.
constexpr std::size_t kNoiseBytes = std::size_t{8} << 20;
// The best of so many runs stands for a trial: others use the disk too, and the first run pays for
// memory and blocks that the next ones find ready.
constexpr int kRuns = 2;
// What is faster than the defaults by less is noise.
constexpr double kClearlyFaster = 0.95;

// Not zeros: file systems that compress would be flattered.
Buffer noise() {
  Buffer buffer(kNoiseBytes);
  std::uint64_t state = 0x9E3779B97F4A7C15ull;
  for (std::size_t at = 0; at < kNoiseBytes; at += sizeof state) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    std::memcpy(buffer.data() + at, &state, sizeof state);
  }
  return buffer;
}

class Prober {
 public:
  Prober(const std::string& directory, std::uint64_t bytes, System& system)
      : directory_(directory), bytes_(bytes), system_(system), noise_(noise()) {
    in_memory_ = create(std::make_shared<Trace>(false), kChunk, Direct::off)->in_memory();
  }

  bool in_memory() const noexcept { return in_memory_; }

  // Keeps the better of what the trial knows and this run.
  void run(Trial* trial) {
    try {
      Engine engine(trial->asked, system_);
      trial->options = with_chosen(trial->asked, engine.chosen());
      trial->own_threads =
          in_memory_ && trial->asked.threads == 0 && trial->asked.queue_depth == 0;
      run(engine, trial);
    } catch (const IoError& error) {
      const bool refused = error.path() == "io_uring" ||
                           (error.code() == EINVAL && trial->options.direct == Direct::on);
      if (!refused) throw;
      trial->error = std::strerror(error.code());
    }
  }

 private:
  static Options with_chosen(Options options, const Options& chosen) {
    options.queue_depth = chosen.queue_depth;
    options.block_bytes = chosen.block_bytes;
    options.threads = chosen.threads;
    return options;
  }

  // A file that has lost its name already.
  std::unique_ptr<File> create(std::shared_ptr<Trace> trace, std::uint64_t bytes, Direct direct) {
    const std::string path = directory_ + "/.goku-probe-" + std::to_string(::getpid()) + "-" +
                             std::to_string(monotonic_ns());
    std::unique_ptr<File> file;
    try {
      file = File::create(system_, trace, path, bytes, direct, 0600, true);
    } catch (const IoError&) {
      system_.unlink(path.c_str());  // a full disk leaves the empty file
      throw;
    }
    system_.unlink(path.c_str());
    return file;
  }

  void run(Engine& engine, Trial* trial) {
    auto trace = std::make_shared<Trace>(false);
    std::int64_t begin = monotonic_ns();
    std::unique_ptr<File> file = create(trace, bytes_, trial->options.direct);
    auto again = file->duplicate(trial->options.direct);
    {
      auto writer = engine.write(std::move(file), bytes_, kChunk, true);
      for (std::uint64_t at = 0; at < bytes_; at += kNoiseBytes)
        writer->submit(noise_.data(), at, std::min<std::uint64_t>(kNoiseBytes, bytes_ - at));
      writer->finish();
    }
    const double wrote = seconds_since(begin);
    again->forget();  // from the disk and not from the cache, buffered too
    begin = monotonic_ns();
    engine.checksum(std::move(again), kChunk)->result();
    const double read = seconds_since(begin);
    if (trial->read_seconds == 0 || wrote + read < trial->seconds()) {
      trial->write_seconds = wrote;
      trial->read_seconds = read;
    }
  }

  static double seconds_since(std::int64_t begin) {
    return static_cast<double>(monotonic_ns() - begin) * 1e-9;
  }

  const std::string directory_;
  const std::uint64_t bytes_;
  System& system_;
  const Buffer noise_;
  bool in_memory_ = false;
};

}  // namespace

ProbeResult probe(const std::string& directory, double seconds, std::uint64_t bytes,
                  const std::function<bool()>& go_on, System& system) {
  const std::int64_t end = monotonic_ns() + static_cast<std::int64_t>(seconds * 1e9);
  Prober prober(directory, bytes, system);
  ProbeResult result;
  bool interrupted = false;
  const auto over = [&] {
    interrupted = interrupted || !go_on();
    return interrupted || (!result.trials.empty() && monotonic_ns() >= end);
  };
  // Best of those that ran; the defaults stay unless something is clearly faster.
  const auto choose = [&] {
    for (std::size_t index = 0; index < result.trials.size(); ++index) {
      const Trial& trial = result.trials[index];
      const Trial& best = result.trials[result.choice];
      if (trial.read_seconds == 0) continue;
      if (best.read_seconds == 0 || trial.seconds() < kClearlyFaster * best.seconds())
        result.choice = index;
    }
  };
  const auto attempt = [&](const std::vector<Options>& ways) {
    const std::size_t first = result.trials.size();
    for (int run = 0; run < kRuns; ++run) {
      for (std::size_t way = 0; way < ways.size() && !over(); ++way) {
        if (result.trials.size() <= first + way) result.trials.push_back({ways[way], ways[way], false, 0, 0, {}});
        if (result.trials[first + way].error.empty()) prober.run(&result.trials[first + way]);
      }
    }
    choose();
  };

  const auto ask_blocks = [&] {
    std::vector<Options> sizes;
    for (const int shift : {-2, 2}) {
      const Trial& best = result.trials[result.choice];
      Options options = best.asked;
      const std::size_t block = best.options.block_bytes;
      options.block_bytes = shift < 0 ? block >> -shift : block << shift;
      sizes.push_back(options);
    }
    attempt(sizes);
  };

  // One question after the other, each asked of the winner of the last: which system calls,
  // requests of what size, how many at a time.
  std::vector<Options> ways;
  if (prober.in_memory()) {
    // No device: neither a ring nor O_DIRECT passes by anything. The threads that the engine keeps for
    // such files, and pools as they are on a disk.
    ways.emplace_back();
    for (const std::size_t depth : {2, 8}) {
      Options options;
      options.backend = Backend::threads;
      options.queue_depth = depth;
      ways.push_back(options);
    }
    attempt(ways);
    if (result.trials.empty() || interrupted) return {};
    ask_blocks();
    if (interrupted) return {};
    return result;
  }
  for (const Backend backend : {Backend::io_uring, Backend::threads}) {
    for (const Direct direct : {Direct::on, Direct::off}) {
      Options options;
      options.backend = backend;
      options.direct = direct;
      ways.push_back(options);
    }
  }
  attempt(ways);
  if (result.trials.empty() || interrupted) return {};
  ask_blocks();
  ways.clear();
  for (const int shift : {-1, 1}) {
    const Trial& best = result.trials[result.choice];
    Options options = best.asked;
    const std::size_t depth = best.options.queue_depth;
    options.queue_depth = shift < 0 ? depth >> -shift : depth << shift;
    // Without a ring the threads are the depth.
    if (options.backend == Backend::threads) options.threads = 0;
    ways.push_back(options);
  }
  attempt(ways);
  if (interrupted) return {};
  return result;
}

}  // namespace goku::io
