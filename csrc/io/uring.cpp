#include "uring.h"

#include <errno.h>

#if defined(__linux__) && __has_include(<linux/io_uring.h>)

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace goku::io {
namespace {

// The kernel writes the completion ring's tail and reads the submission ring's: each side publishes
// with a release and looks with an acquire.
unsigned look(const unsigned* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
void publish(unsigned* p, unsigned value) { __atomic_store_n(p, value, __ATOMIC_RELEASE); }

class Mapping {
 public:
  Mapping() = default;
  ~Mapping() {
    if (at_ != nullptr) ::munmap(at_, bytes_);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  int map(int fd, std::size_t bytes, std::uint64_t what) {
    void* const at = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd,
                            static_cast<off_t>(what));
    if (at == MAP_FAILED) return errno;
    at_ = at;
    bytes_ = bytes;
    return 0;
  }
  template <typename T>
  T* at(std::uint32_t offset) const {
    return reinterpret_cast<T*>(static_cast<unsigned char*>(at_) + offset);
  }

 private:
  void* at_ = nullptr;
  std::size_t bytes_ = 0;
};

class Descriptor {
 public:
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
  int fd = -1;
};

class KernelRing final : public Ring {
 public:
  int set_up(System& system, unsigned depth) {
    io_uring_params params{};
    ring_.fd = system.uring_setup(depth, &params);
    if (ring_.fd < 0) return -ring_.fd;
    // Linux 5.7: has read and write without vectors, and a completion is never dropped.
    constexpr unsigned kNeeded =
        IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_FAST_POLL;
    if ((params.features & kNeeded) != kNeeded) return ENOSYS;

    const std::size_t submissions = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    const std::size_t completions = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
    int error = rings_.map(ring_.fd, std::max(submissions, completions), IORING_OFF_SQ_RING);
    if (error != 0) return error;
    error = entries_.map(ring_.fd, params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES);
    if (error != 0) return error;
    sq_tail_ = rings_.at<unsigned>(params.sq_off.tail);
    sq_mask_ = *rings_.at<unsigned>(params.sq_off.ring_mask);
    sq_array_ = rings_.at<unsigned>(params.sq_off.array);
    cq_head_ = rings_.at<unsigned>(params.cq_off.head);
    cq_tail_ = rings_.at<unsigned>(params.cq_off.tail);
    cq_mask_ = *rings_.at<unsigned>(params.cq_off.ring_mask);
    cqes_ = rings_.at<io_uring_cqe>(params.cq_off.cqes);
    return 0;
  }

  void start(Slot* slot) override {
    const Request& request = slot->request;
    const unsigned index = (tail_ + unsubmitted_) & sq_mask_;
    ++unsubmitted_;
    sq_array_[index] = index;
    io_uring_sqe* const sqe = entries_.at<io_uring_sqe>(0) + index;
    std::memset(sqe, 0, sizeof *sqe);
    // Plain addresses and no registered buffers: those would have to be the caller's memory, of any
    // size, and huge pages are pinned in no time.
    sqe->opcode = request.write ? IORING_OP_WRITE : IORING_OP_READ;
    sqe->fd = request.file->fd();
    sqe->addr = reinterpret_cast<std::uint64_t>(request.memory + request.done);
    sqe->len = static_cast<std::uint32_t>(request.length - request.done);
    sqe->off = request.offset + request.done;
    sqe->user_data = reinterpret_cast<std::uint64_t>(slot);
    enter(0);
  }

  bool ready() const override { return *cq_head_ != look(cq_tail_); }

  Ended wait() override {
    while (!ready()) enter(1);
    const unsigned head = *cq_head_;
    const io_uring_cqe cqe = cqes_[head & cq_mask_];
    publish(cq_head_, head + 1);
    return {reinterpret_cast<Slot*>(cqe.user_data), cqe.res};
  }

 private:
  // Submits what the kernel has not taken yet, and waits for so many completions.
  void enter(unsigned completions) {
    publish(sq_tail_, tail_ + unsubmitted_);
    const long taken =
        ::syscall(SYS_io_uring_enter, ring_.fd, unsubmitted_, completions,
                  completions > 0 ? unsigned{IORING_ENTER_GETEVENTS} : 0u, nullptr, 0);
    // EINTR, EAGAIN (no memory just now), EBUSY (completions to be taken first): wait() comes
    // again.
    if (taken < 0) return;
    tail_ += static_cast<unsigned>(taken);
    unsubmitted_ -= static_cast<unsigned>(taken);
  }

  Descriptor ring_;
  Mapping rings_;
  Mapping entries_;
  unsigned* sq_tail_ = nullptr;
  unsigned* sq_array_ = nullptr;
  unsigned sq_mask_ = 0;
  unsigned* cq_head_ = nullptr;
  unsigned* cq_tail_ = nullptr;
  io_uring_cqe* cqes_ = nullptr;
  unsigned cq_mask_ = 0;
  unsigned tail_ = 0;         // entries that the kernel has taken
  unsigned unsubmitted_ = 0;  // and that it has not taken yet
};

}  // namespace

std::unique_ptr<Ring> Ring::open(System& system, unsigned depth, int* error) {
  auto ring = std::make_unique<KernelRing>();
  *error = ring->set_up(system, depth);
  if (*error != 0) return nullptr;
  return ring;
}

}  // namespace goku::io

#else

namespace goku::io {

std::unique_ptr<Ring> Ring::open(System&, unsigned, int* error) {
  *error = ENOSYS;
  return nullptr;
}

}  // namespace goku::io

#endif
