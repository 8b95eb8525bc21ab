#include "request.h"

#include <errno.h>

#include <chrono>
#include <thread>

namespace goku::io {
namespace {

// Interrupted or refused for the moment, without any progress between. Regular files know neither
// in practice; network and FUSE file systems do.
constexpr int kMostAttempts = 100;
constexpr int kAttemptsWithoutPause = 10;

}  // namespace

bool Request::advance(std::int64_t result) {
  const auto again = [this](int code) {
    if (++attempts < kMostAttempts) {
      if (attempts > kAttemptsWithoutPause)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      return true;
    }
    error = code;
    return false;
  };
  if (result == -EINTR || result == -EAGAIN) return again(static_cast<int>(-result));
  if (result == -EINVAL && !refused && (!file->direct() || file->leave_direct())) {
    // Refused as O_DIRECT by a file that has become buffered (by this or another request): once
    // more.
    refused = true;
    return true;
  }
  if (result < 0) {
    error = static_cast<int>(-result);
    return false;
  }
  if (result == 0) {
    if (write) return again(EIO);
    return false;  // the end of the file
  }
  auto count = static_cast<std::size_t>(result);
  if (count > length - done) count = length - done;
  if (write) file->record(began_ns, "write", offset + done, count);
  if (done + count >= needed) {
    done += count;
    return false;
  }
  if (file->direct()) {
    // What follows has to begin at an aligned place again.
    const std::size_t whole = count / kAlignment * kAlignment;
    if (!write && whole != count) {
      done += count;  // only the file's end cuts a direct read there
      return false;
    }
    if (whole == 0) return again(EIO);
    count = whole;
  }
  done += count;
  attempts = 0;
  began_ns = file->trace().now();
  return true;
}

}  // namespace goku::io
