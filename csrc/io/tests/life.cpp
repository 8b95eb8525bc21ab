// Cancellation, ends, limits and forks in the middle of work.
#include <errno.h>
#include <sys/wait.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <thread>

#include "check.h"

namespace goku::io::testing {
namespace {

constexpr std::uint64_t kChunk = 4096;

// Holds transfers until it is opened, and knows how many were held at most. (The ring's own thread
// holds one at a time, with the others under way behind it.)
class Gate {
 public:
  std::int64_t pass(std::int64_t result) {
    std::unique_lock<std::mutex> lock(mutex_);
    most_ = std::max(most_, ++waiting_);
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_; });
    --waiting_;
    return result;
  }
  void await(std::size_t count) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return waiting_ >= count; });
  }
  void open() {
    const std::lock_guard<std::mutex> lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  std::size_t most() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return most_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
  std::size_t waiting_ = 0;
  std::size_t most_ = 0;
};

// An engine as it comes, for files on a disk and for files in memory, which threads of their own move.
struct Life {
  explicit Life(const Kind& kind) : options(small(kind)) {}
  Life() {
    options.block_bytes = 65536;
    system.memory = true;
  }
  Options options;
  FaultySystem system;
};

// Calls `test` with each.
template <typename Test>
void for_all(const Test& test) {
  for (const Kind& kind : kinds()) {
    Life life(kind);
    test(life);
  }
  Life life;
  test(life);
}

void cancelled_in_the_middle(Folder& folder) {
  for_all([&](Life& life) {
    FaultySystem& system = life.system;
    Gate gate;
    system.twist = [&](bool, std::uint64_t, std::size_t, std::int64_t result) {
      return gate.pass(result);
    };
    Engine engine(life.options, system);
    Bytes data = noise(1 << 20);
    const std::string path = folder.fresh();
    auto writer = engine.create(path, data.size(), kChunk, true, 0644);
    const Ticket first = writer->submit(data.data(), 0, 65536);
    const Ticket rest = writer->submit(data.data() + 65536, 65536, data.size() - 65536);
    gate.await(1);
    CHECK(!writer->wait(first, 0.01));
    CHECK(!writer->done(first) && !writer->done(rest));

    std::atomic<bool> back{false};
    std::thread canceller([&] {
      writer->cancel();
      back = true;
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK(!back);  // what is in flight still reads the memory
    gate.open();
    canceller.join();
    CHECK(writer->done(first) && writer->done(rest));
    for (auto& byte : data) byte = 0;
    CHECK(writer->written() < data.size());
    CHECK(errno_of([&] { writer->finish(); }, path) == ECANCELED);
    CHECK(errno_of([&] { writer->wait(rest, 0.0); }, path) == ECANCELED);
    CHECK(errno_of([&] { writer->submit(data.data(), 0, kChunk); }, path) == ECANCELED);
  });
}

void no_more_than_the_depth_at_once(Folder& folder) {
  FaultySystem system;
  Gate gate;
  system.twist = [&](bool, std::uint64_t, std::size_t, std::int64_t result) {
    return gate.pass(result);
  };
  Engine engine(small({Backend::threads, Direct::off}), system);
  const Bytes data = noise(1 << 20);
  auto writer = engine.create(folder.fresh(), data.size(), kChunk, false, 0644);
  writer->submit(data.data(), 0, data.size());
  gate.await(4);
  gate.open();
  writer->finish();
  CHECK(gate.most() == 4);
}

void ended_in_the_middle(Folder& folder) {
  for_all([&](Life& life) {
    for (int round = 0; round < 10; ++round) {
      auto engine = std::make_unique<Engine>(life.options, life.system);
      Bytes data = noise(1 << 20, static_cast<std::uint64_t>(round) + 1);
      auto writer = std::make_unique<Handle<Writer>>(
          engine->create(folder.fresh(), data.size(), kChunk, false, 0644));
      (*writer)->submit(data.data(), 0, data.size());
      if (round % 3 == 0) writer.reset();
      if (round % 3 == 1) engine->close();
      engine.reset();
      // Nobody reads it any more, whoever went first.
      for (auto& byte : data) byte = 0;
    }
  });
}

// While one thread closes the engine another still makes files and reads them: each is refused, or ends.
void closed_while_used(Folder& folder) {
  for_all([&](Life& life) {
    for (int round = 0; round < 10; ++round) {
      const Bytes data = noise(1 << 18);
      Engine engine(life.options, life.system);
      std::thread user([&] {
        for (;;) {  // until it is closed
          const std::string path = folder.fresh();
          const int error = errno_of(
              [&] {
                auto writer = engine.create(path, data.size(), kChunk, false, 0644);
                writer->submit(data.data(), 0, data.size());
                writer->finish();
                engine.checksum(path, kChunk)->result();
              },
              path);
          CHECK(error == 0 || error == ECANCELED || error == -1);
          if (error != 0) return;
        }
      });
      std::this_thread::sleep_for(std::chrono::milliseconds(round));
      engine.close();
      user.join();
    }
  });
}

void closed_from_two_sides(Folder& folder) {
  for_all([&](Life& life) {
    Engine engine(life.options, life.system);
    const Bytes data = noise(1 << 20);
    const std::string path = folder.fresh();
    auto writer = engine.create(path, data.size(), kChunk, false, 0644);
    writer->submit(data.data(), 0, data.size());
    std::thread finisher([&] {
      const int error = errno_of([&] { writer->finish(); }, path);
      CHECK(error == 0 || error == ECANCELED);
    });
    std::thread other([&] { engine.close(); });
    engine.close();
    other.join();
    finisher.join();
  });
}

void forked(Folder& folder) {
#if !defined(__SANITIZE_THREAD__)  // which does not follow a fork of several threads
  for_all([&](Life& life) {
    Engine engine(life.options, life.system);
    const Bytes data = noise(1 << 20);
    auto writer = engine.create(folder.fresh(), data.size(), kChunk, false, 0644);
    writer->submit(data.data(), 0, data.size());
    const pid_t child = ::fork();
    if (child == 0) {
      int refused = 0;
      try {
        writer->finish();
      } catch (const std::runtime_error&) {
        ++refused;
      }
      try {
        engine.close();
      } catch (const std::runtime_error&) {
        ++refused;
      }
      {
        const auto moved = std::move(writer);  // destroyed here, without waiting
      }
      ::_exit(refused == 2 ? 0 : 1);
    }
    int status = -1;
    CHECK(::waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    writer->finish();
  });
#else
  (void)folder;
#endif
}

}  // namespace

void test_life() {
  Folder folder;
  cancelled_in_the_middle(folder);
  no_more_than_the_depth_at_once(folder);
  ended_in_the_middle(folder);
  closed_from_two_sides(folder);
  closed_while_used(folder);
  forked(folder);
}

}  // namespace goku::io::testing
