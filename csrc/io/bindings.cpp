// goku_runtime._io. Registers only; the Python types stand in runtime/goku_runtime/_io.pyi.
#include "bindings.h"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "copy.h"
#include "crc32c.h"

namespace py = pybind11;

namespace {

using goku::io::as_crc;
using goku::io::ContiguousView;

// Below this size the work is shorter than handing the lock over.
constexpr std::size_t kReleaseFrom = 64 * 1024;

using Function = std::uint32_t (*)(std::uint32_t, const void*, std::size_t) noexcept;

std::uint32_t checksum(Function function, py::handle buffer, std::int64_t crc) {
  const std::uint32_t start = as_crc(crc, "crc");
  const ContiguousView view(buffer);
  if (view.size() < kReleaseFrom) return function(start, view.data(), view.size());
  py::gil_scoped_release release;
  return function(start, view.data(), view.size());
}

void copy_rows(py::handle rows, std::int64_t threads) {
  if (threads < 1)
    throw py::value_error("threads is " + std::to_string(threads) + "; allowed is 1 and above");
  const ContiguousView view(rows, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT);
  goku::io::check_rows(view, "moves", 3, "three");
  const auto* const values = static_cast<const std::int64_t*>(view.data());
  std::vector<goku::io::Move> moves(view.size() / (3 * sizeof(std::int64_t)));
  for (std::size_t row = 0; row < moves.size(); ++row) {
    const std::int64_t* const value = values + 3 * row;
    moves[row] = {reinterpret_cast<unsigned char*>(static_cast<std::uintptr_t>(value[0])),
                  reinterpret_cast<const unsigned char*>(static_cast<std::uintptr_t>(value[1])),
                  goku::io::as_count(value[2], "the length of a move")};
  }
  py::gil_scoped_release release;
  goku::io::copy(moves, static_cast<std::size_t>(threads));
}

}  // namespace

PYBIND11_MODULE(_io, m, py::mod_gil_not_used()) {
  m.doc() = "The native part of goku_runtime: checksums, copies and the file engine.";
  m.def(
      "crc32c",
      [](py::handle buffer, std::int64_t crc) { return checksum(goku::io::crc32c, buffer, crc); },
      py::arg("buffer"), py::arg("crc") = 0);
  m.def(
      "crc32c_portable",
      [](py::handle buffer, std::int64_t crc) {
        return checksum(goku::io::crc32c_portable, buffer, crc);
      },
      py::arg("buffer"), py::arg("crc") = 0);
  m.def(
      "crc32c_combine",
      [](std::int64_t crc1, std::int64_t crc2, std::int64_t len2) {
        if (len2 < 0)
          throw py::value_error("len2 is " + std::to_string(len2) + "; allowed is 0 and above");
        return goku::io::crc32c_combine(as_crc(crc1, "crc1"), as_crc(crc2, "crc2"),
                                        static_cast<std::uint64_t>(len2));
      },
      py::arg("crc1"), py::arg("crc2"), py::arg("len2"));
  m.def("crc32c_implementation", &goku::io::crc32c_implementation);
  m.def("copy", copy_rows, py::arg("moves"), py::arg("threads"));
  goku::io::register_errors(m);
  goku::io::register_buffer(m);
  goku::io::register_engine(m);
}
