// goku_runtime._io. Registers only; the Python types stand in runtime/goku_runtime/_io.pyi.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "crc32c.h"

namespace py = pybind11;

namespace {

// A contiguous view of a buffer object, held for as long as the checksum reads it: the exporter may
// not move it.
class ContiguousView {
 public:
  explicit ContiguousView(py::handle object) {
    // PyBUF_SIMPLE: the exporter itself refuses what is not C-contiguous (BufferError, NumPy:
    // ValueError) and what is no buffer at all (TypeError).
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  }
  ~ContiguousView() { PyBuffer_Release(&view_); }
  ContiguousView(const ContiguousView&) = delete;
  ContiguousView& operator=(const ContiguousView&) = delete;

  const void* data() const { return view_.buf; }
  std::size_t size() const { return static_cast<std::size_t>(view_.len); }

 private:
  Py_buffer view_{};
};

std::uint32_t as_crc(std::int64_t value, const char* name) {
  if (value < 0 || value > 0xFFFFFFFFll) {
    throw py::value_error(std::string(name) + " is " + std::to_string(value) +
                          "; allowed is 0 to 4294967295");
  }
  return static_cast<std::uint32_t>(value);
}

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

}  // namespace

PYBIND11_MODULE(_io, m, py::mod_gil_not_used()) {
  m.doc() = "The native part of goku_runtime: checksums.";
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
}
