// What the files of the bindings share: how Python's values become the engine's.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <string>

namespace goku::io {

namespace py = pybind11;

// A contiguous view of a buffer object, held for as long as it is read: the exporter may not move
// it.
class ContiguousView {
 public:
  // PyBUF_SIMPLE: the exporter itself refuses what is not C-contiguous (BufferError, NumPy:
  // ValueError) and what is no buffer at all (TypeError).
  explicit ContiguousView(py::handle object, int flags = PyBUF_SIMPLE) {
    if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw py::error_already_set();
  }
  ~ContiguousView() { PyBuffer_Release(&view_); }
  ContiguousView(const ContiguousView&) = delete;
  ContiguousView& operator=(const ContiguousView&) = delete;

  const void* data() const { return view_.buf; }
  std::size_t size() const { return static_cast<std::size_t>(view_.len); }
  const Py_buffer& view() const { return view_; }

 private:
  Py_buffer view_{};
};

inline std::uint32_t as_crc(std::int64_t value, const char* name) {
  if (value < 0 || value > 0xFFFFFFFFll) {
    throw py::value_error(std::string(name) + " is " + std::to_string(value) +
                          "; allowed is 0 to 4294967295");
  }
  return static_cast<std::uint32_t>(value);
}

inline std::uint64_t as_count(std::int64_t value, const char* name) {
  if (value < 0) {
    throw py::value_error(std::string(name) + " is " + std::to_string(value) +
                          "; allowed is 0 and above");
  }
  return static_cast<std::uint64_t>(value);
}

// `number` says `columns` in words.
inline void check_rows(const ContiguousView& view, const std::string& name, std::size_t columns,
                       const char* number) {
  const char* const format = view.view().format == nullptr ? "B" : view.view().format;
  // "q" or "l", with a sign of native order before it or none.
  const char* const letter = format + (*format != '\0' && std::strchr("@=<", *format) ? 1 : 0);
  const bool integers = view.view().itemsize == 8 && (*letter == 'q' || *letter == 'l');
  if (!integers || view.size() % (columns * sizeof(std::int64_t)) != 0) {
    throw py::value_error(name + " has " + std::to_string(view.size()) + " bytes of format '" +
                          format + "'; allowed are rows of " + number + " int64");
  }
}

// str, bytes or os.PathLike, as the system's bytes and back.
std::string as_path(py::handle path);
py::str from_path(const std::string& path);

void register_errors(py::module_& m);
void register_buffer(py::module_& m);
void register_engine(py::module_& m);

}  // namespace goku::io
