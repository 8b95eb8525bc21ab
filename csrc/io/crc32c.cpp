#include "crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#define GOKU_CRC32C_HARDWARE "sse4.2"
#define GOKU_CRC32C_TARGET __attribute__((target("sse4.2")))
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#define GOKU_CRC32C_HARDWARE "armv8"
#if defined(__clang__)
#define GOKU_CRC32C_TARGET __attribute__((target("crc")))
#else
#define GOKU_CRC32C_TARGET __attribute__((target("+crc")))
#endif
#endif

namespace goku::io {
namespace {

// ---- arithmetic in GF(2)[x] modulo the polynomial
// --------------------------------------------------------------- A 32-bit value is a polynomial of
// degree < 32 with the bits reflected: bit 31 is x^0, bit 0 is x^31.

constexpr std::uint32_t kPolynomial = 0x82F63B78u;
constexpr std::uint32_t kOne = 0x80000000u;  // x^0
constexpr std::uint32_t kX8 = 0x00800000u;   // x^8: what one zero byte multiplies a register by

constexpr std::uint32_t times_x(std::uint32_t a) {
  return (a >> 1) ^ ((a & 1u) != 0 ? kPolynomial : 0u);
}

constexpr std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
  std::uint32_t product = 0;
  for (std::uint32_t bit = kOne; bit != 0; bit >>= 1) {
    if ((a & bit) != 0) product ^= b;
    b = times_x(b);
  }
  return product;
}

// x^(8 * bytes), by square and multiply.
constexpr std::uint32_t power_of_x8(std::uint64_t bytes) {
  std::uint32_t result = kOne;
  for (std::uint32_t square = kX8; bytes != 0; bytes >>= 1) {
    if ((bytes & 1u) != 0) result = multiply(result, square);
    square = multiply(square, square);
  }
  return result;
}

// ---- tables, built by the compiler ----

using Table = std::array<std::uint32_t, 256>;

// slice[k][b]: the register after byte b and then k zero bytes.
constexpr std::array<Table, 8> make_slices() {
  std::array<Table, 8> slice{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = times_x(value);
    slice[0][byte] = value;
  }
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    for (std::size_t k = 1; k < 8; ++k) {
      const std::uint32_t before = slice[k - 1][byte];
      slice[k][byte] = (before >> 8) ^ slice[0][before & 0xFFu];
    }
  }
  return slice;
}

constexpr std::array<Table, 8> kSlice = make_slices();

// shift[k][b]: byte b at position k of the register, times x^(8 * bytes).
constexpr std::array<Table, 4> make_shift(std::uint64_t bytes) {
  const std::uint32_t factor = power_of_x8(bytes);
  std::array<Table, 4> shift{};
  for (std::size_t k = 0; k < 4; ++k) {
    for (int bit = 0; bit < 8; ++bit) {
      const std::uint32_t image = multiply(factor, 1u << (8 * static_cast<unsigned>(k) + bit));
      // Linear: an entry is the sum of the images of its bits.
      for (std::uint32_t byte = 0; byte < 256; ++byte) {
        if ((byte >> bit & 1u) != 0) shift[k][byte] ^= image;
      }
    }
  }
  return shift;
}

inline std::uint32_t apply(const std::array<Table, 4>& shift, std::uint32_t state) {
  return shift[0][state & 0xFFu] ^ shift[1][state >> 8 & 0xFFu] ^ shift[2][state >> 16 & 0xFFu] ^
         shift[3][state >> 24];
}

// ---- portable ----

// Composed from bytes, so that it means the same on either byte order; compilers see one
// load in it.
inline std::uint32_t load32(const unsigned char* p) {
  return static_cast<std::uint32_t>(p[0]) | static_cast<std::uint32_t>(p[1]) << 8 |
         static_cast<std::uint32_t>(p[2]) << 16 | static_cast<std::uint32_t>(p[3]) << 24;
}

std::uint32_t advance_portable(std::uint32_t state, const unsigned char* p, std::size_t size) {
  for (; size >= 8; size -= 8, p += 8) {
    const std::uint32_t low = load32(p) ^ state;
    const std::uint32_t high = load32(p + 4);
    state = kSlice[7][low & 0xFFu] ^ kSlice[6][low >> 8 & 0xFFu] ^ kSlice[5][low >> 16 & 0xFFu] ^
            kSlice[4][low >> 24] ^ kSlice[3][high & 0xFFu] ^ kSlice[2][high >> 8 & 0xFFu] ^
            kSlice[1][high >> 16 & 0xFFu] ^ kSlice[0][high >> 24];
  }
  for (; size > 0; --size, ++p) state = (state >> 8) ^ kSlice[0][(state ^ *p) & 0xFFu];
  return state;
}

// ---- hardware ----
#if defined(GOKU_CRC32C_HARDWARE)

// The instruction takes 8 bytes per cycle but answers only after 3 (x86) or 2 to 3 (Arm), so one
// chain runs at a third of the speed. Three chains over three neighbouring lanes fill the pipeline;
// a lane's register is then moved past the lanes that follow it: a multiplication with the power of
// x that the lane's bits make, by four table look-ups.
// At 4096 the look-ups are 1% of the work, and the three lanes lie well within the L1 cache.
constexpr std::size_t kLongLane = 4096;
constexpr std::size_t kShortLane = 256;

constexpr std::array<Table, 4> kLongShift = make_shift(kLongLane);
constexpr std::array<Table, 4> kShortShift = make_shift(kShortLane);

inline std::uint64_t load64(const unsigned char* p) {
  std::uint64_t word;
  std::memcpy(&word, p, sizeof word);  // both hardware paths are little endian
  return word;
}

#if defined(__x86_64__)
bool has_hardware() noexcept {
  __builtin_cpu_init();
  return __builtin_cpu_supports("sse4.2") != 0;
}
GOKU_CRC32C_TARGET inline std::uint64_t step(std::uint64_t state, std::uint64_t word) {
  return _mm_crc32_u64(state, word);
}
GOKU_CRC32C_TARGET inline std::uint32_t step_byte(std::uint32_t state, unsigned char byte) {
  return _mm_crc32_u8(state, byte);
}
#else
bool has_hardware() noexcept { return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }
GOKU_CRC32C_TARGET inline std::uint64_t step(std::uint64_t state, std::uint64_t word) {
  return __crc32cd(static_cast<std::uint32_t>(state), word);
}
GOKU_CRC32C_TARGET inline std::uint32_t step_byte(std::uint32_t state, unsigned char byte) {
  return __crc32cb(state, byte);
}
#endif

template <std::size_t kLane>
GOKU_CRC32C_TARGET std::uint32_t advance_lanes(std::uint32_t state, const unsigned char*& p,
                                               std::size_t& size,
                                               const std::array<Table, 4>& shift) {
  while (size >= 3 * kLane) {
    std::uint64_t a = state, b = 0, c = 0;
    for (const unsigned char* end = p + kLane; p < end; p += 8) {
      a = step(a, load64(p));
      b = step(b, load64(p + kLane));
      c = step(c, load64(p + 2 * kLane));
    }
    state = apply(shift, static_cast<std::uint32_t>(a)) ^ static_cast<std::uint32_t>(b);
    state = apply(shift, state) ^ static_cast<std::uint32_t>(c);
    p += 2 * kLane;
    size -= 3 * kLane;
  }
  return state;
}

GOKU_CRC32C_TARGET std::uint32_t advance_hardware(std::uint32_t state, const unsigned char* p,
                                                  std::size_t size) {
  // Whole words at aligned addresses never straddle a cache line.
  for (; size > 0 && reinterpret_cast<std::uintptr_t>(p) % 8 != 0; --size, ++p)
    state = step_byte(state, *p);
  state = advance_lanes<kLongLane>(state, p, size, kLongShift);
  state = advance_lanes<kShortLane>(state, p, size, kShortShift);
  for (; size >= 8; size -= 8, p += 8) state = static_cast<std::uint32_t>(step(state, load64(p)));
  for (; size > 0; --size, ++p) state = step_byte(state, *p);
  return state;
}

#endif  // GOKU_CRC32C_HARDWARE

}  // namespace

std::uint32_t crc32c_portable(std::uint32_t crc, const void* data, std::size_t size) noexcept {
  return ~advance_portable(~crc, static_cast<const unsigned char*>(data), size);
}

std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t size) noexcept {
#if defined(GOKU_CRC32C_HARDWARE)
  static const bool hardware = has_hardware();
  if (hardware) return ~advance_hardware(~crc, static_cast<const unsigned char*>(data), size);
#endif
  return crc32c_portable(crc, data, size);
}

std::uint32_t crc32c_combine(std::uint32_t crc_a, std::uint32_t crc_b,
                             std::uint64_t size_b) noexcept {
  // The initial value and the final xor of the two halves cancel: only A's value travels past B's
  // bytes.
  return multiply(power_of_x8(size_b), crc_a) ^ crc_b;
}

Crc32cJoiner::Crc32cJoiner(std::uint64_t size_b) noexcept : shift_(make_shift(size_b)) {}

std::uint32_t Crc32cJoiner::operator()(std::uint32_t crc_a, std::uint32_t crc_b) const noexcept {
  return apply(shift_, crc_a) ^ crc_b;
}

const char* crc32c_implementation() noexcept {
#if defined(GOKU_CRC32C_HARDWARE)
  if (has_hardware()) return GOKU_CRC32C_HARDWARE;
#endif
  return "portable";
}

}  // namespace goku::io
