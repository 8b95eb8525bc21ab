// The engine's errors as Python's, and paths and memory, which both sides pass to each other.
#include <stdexcept>

#include "bindings.h"
#include "buffer.h"
#include "errors.h"

namespace goku::io {
namespace {

PyObject* chunk_error = nullptr;  // the module's, for the life of the process

// Messages name paths, and those are not always UTF-8.
py::object text(const char* what) {
  return py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(what));
}

void raise_chunk_error(const ChunkError& error) {
  const py::object raised = py::reinterpret_borrow<py::object>(chunk_error)(text(error.what()));
  raised.attr("offset") = error.chunk().offset;
  raised.attr("length") = error.chunk().length;
  raised.attr("wanted") = error.chunk().wanted;
  raised.attr("found") = error.chunk().found;
  raised.attr("filename") = from_path(error.path());
  PyErr_SetObject(chunk_error, raised.ptr());
}

void translate(std::exception_ptr pointer) {
  try {
    std::rethrow_exception(pointer);
  } catch (const IoError& error) {
    // From the number Python makes the subclass: FileExistsError, PermissionError, ...
    errno = error.code();
    PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, from_path(error.path()).ptr());
  } catch (const ChunkError& error) {
    raise_chunk_error(error);
  } catch (const std::invalid_argument& error) {
    PyErr_SetObject(PyExc_ValueError, text(error.what()).ptr());
  }
}

}  // namespace

std::string as_path(py::handle path) {
  PyObject* bytes = nullptr;
  if (PyUnicode_FSConverter(path.ptr(), &bytes) == 0) throw py::error_already_set();
  return py::reinterpret_steal<py::bytes>(bytes);
}

py::str from_path(const std::string& path) {
  return py::reinterpret_steal<py::str>(
      PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<Py_ssize_t>(path.size())));
}

void register_errors(py::module_& m) {
  chunk_error = PyErr_NewExceptionWithDoc(
      "goku_runtime._io.ChunkError",
      "A chunk of a file does not have the CRC-32C that it was written with.", PyExc_ValueError,
      nullptr);
  if (chunk_error == nullptr) throw py::error_already_set();
  m.add_object("ChunkError", chunk_error);
  py::register_local_exception_translator(&translate);
}

void register_buffer(py::module_& m) {
  py::class_<Buffer>(m, "Buffer", py::buffer_protocol(), py::is_final())
      .def(py::init([](std::int64_t nbytes, bool huge) {
             if (nbytes < 1) {
               throw py::value_error("nbytes is " + std::to_string(nbytes) +
                                     "; allowed is 1 and above");
             }
             return Buffer(static_cast<std::size_t>(nbytes), huge);
           }),
           py::arg("nbytes"), py::arg("huge") = true)
      .def_property_readonly(
          "address",
          [](const Buffer& self) { return reinterpret_cast<std::uintptr_t>(self.data()); })
      .def_property_readonly("nbytes", &Buffer::size)
      .def("__len__", &Buffer::size)
      .def_buffer([](Buffer& self) {
        return py::buffer_info(self.data(), static_cast<py::ssize_t>(self.size()), false);
      });
}

}  // namespace goku::io
