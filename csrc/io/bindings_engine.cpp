// The engine and its files for Python. Blocking calls give up the interpreter's lock, and look for
// signals while they wait.
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <optional>

#include "bindings.h"
#include "crc32c.h"
#include "engine.h"
#include "probe.h"

namespace goku::io {
namespace {

// How long Ctrl-C may go unseen. The lock is taken so often and no more.
constexpr double kSlice = 0.1;

// wait(seconds) -> whether it is over.
template <typename Wait>
bool patiently(std::optional<double> timeout, Wait wait) {
  if (timeout && !(*timeout >= 0)) {
    throw py::value_error("timeout is " + std::to_string(*timeout) +
                          "; allowed is 0 and above, or None");
  }
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  for (;;) {
    double slice = kSlice;
    if (timeout) {
      const std::chrono::duration<double> waited = Clock::now() - begin;
      slice = std::clamp(*timeout - waited.count(), 0.0, kSlice);
    }
    {
      py::gil_scoped_release release;
      if (wait(slice)) return true;
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (timeout && slice < kSlice) return false;
  }
}

py::bytes little_endian(const std::vector<std::uint32_t>& crcs) {
  std::string bytes(crcs.size() * 4, '\0');
  for (std::size_t index = 0; index < crcs.size(); ++index) {
    for (std::size_t byte = 0; byte < 4; ++byte)
      bytes[4 * index + byte] = static_cast<char>(crcs[index] >> (8 * byte) & 0xFFu);
  }
  return py::bytes(bytes);
}

std::optional<std::vector<std::uint32_t>> from_little_endian(py::handle object) {
  if (object.is_none()) return std::nullopt;
  const ContiguousView view(object);
  if (view.size() % 4 != 0) {
    throw py::value_error("crcs has " + std::to_string(view.size()) +
                          " bytes; allowed are multiples of 4");
  }
  const auto* const bytes = static_cast<const unsigned char*>(view.data());
  std::vector<std::uint32_t> crcs(view.size() / 4);
  for (std::size_t index = 0; index < crcs.size(); ++index) {
    for (std::size_t byte = 0; byte < 4; ++byte)
      crcs[index] |= static_cast<std::uint32_t>(bytes[4 * index + byte]) << (8 * byte);
  }
  return crcs;
}

template <typename T>
T one_of(const char* what, const std::string& value, std::initializer_list<T> all) {
  std::string allowed;
  for (const T one : all) {
    if (value == name(one)) return one;
    allowed += (allowed.empty() ? "" : ", ") + std::string(name(one));
  }
  throw py::value_error(std::string(what) + " is '" + value + "'; allowed are " + allowed);
}

std::unique_ptr<Engine> make_engine(const std::string& backend, const std::string& direct,
                                    std::int64_t queue_depth, std::int64_t block_bytes,
                                    std::int64_t threads, std::int64_t memory_budget, bool trace) {
  Options options;
  options.backend =
      one_of("backend", backend, {Backend::automatic, Backend::io_uring, Backend::threads});
  options.direct = one_of("direct", direct, {Direct::automatic, Direct::on, Direct::off});
  options.queue_depth = as_count(queue_depth, "queue_depth");
  options.block_bytes = as_count(block_bytes, "block_bytes");
  options.threads = as_count(threads, "threads");
  options.memory_budget = as_count(memory_budget, "memory_budget");
  options.trace = trace;
  return std::make_unique<Engine>(options);
}

py::dict describe(const Engine& engine) {
  const Core& core = engine.core();
  const Options& chosen = engine.chosen();
  py::dict said;
  said["backend"] = name(chosen.backend);
  said["backend_wanted"] = name(core.wanted);
  said["reason"] = core.reason.empty() ? py::object(py::none()) : py::str(core.reason);
  said["direct"] = name(chosen.direct);
  said["queue_depth"] = chosen.queue_depth;
  said["block_bytes"] = chosen.block_bytes;
  said["threads"] = chosen.threads;
  said["bounce_bytes"] = chosen.queue_depth * chosen.block_bytes;
  said["crc32c"] = crc32c_implementation();
  return said;
}

py::list events(const Engine& engine) {
  py::list list;
  for (const Event& event : engine.events()) {
    list.append(py::make_tuple(event.begin_ns, event.end_ns, event.operation,
                               from_path(*event.path), event.offset, event.length));
  }
  return list;
}

// ---- reading ----

// The two ends that a reading may have; Python knows them as two types.
struct FileReader {
  Handle<Reader> handle;
};
struct FileChecksum {
  Handle<Reader> handle;
};

FileReader start_read(Engine& engine, py::handle path, py::handle segments, std::int64_t chunk,
                      py::handle crcs, std::int64_t size) {
  const ContiguousView view(segments, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT);
  check_rows(view, "segments", 6, "six");
  const std::string name = as_path(path);
  auto wanted = from_little_endian(crcs);
  py::gil_scoped_release release;
  return {engine.read(name, static_cast<const std::int64_t*>(view.data()),
                      view.size() / (6 * sizeof(std::int64_t)), as_count(chunk, "chunk"),
                      std::move(wanted), as_count(size, "size"))};
}

FileChecksum start_checksum(Engine& engine, py::handle path, std::int64_t chunk) {
  const std::string name = as_path(path);
  py::gil_scoped_release release;
  return {engine.checksum(name, as_count(chunk, "chunk"))};
}

ReadStats result(FileReader& self) {
  Reader& reader = *self.handle;
  patiently(std::nullopt, [&](double seconds) { return reader.wait(seconds); });
  return reader.result();
}

py::tuple sums(FileChecksum& self) {
  Reader& reader = *self.handle;
  patiently(std::nullopt, [&](double seconds) { return reader.wait(seconds); });
  reader.result();
  return py::make_tuple(reader.size(), reader.crc(), little_endian(reader.chunk_crcs()));
}

template <typename T>
void register_reading(py::module_& m, const char* name) {
  py::class_<T>(m, name, py::is_final())
      .def_property_readonly("progress",
                             [](const T& self) {
                               return py::make_tuple(self.handle->bytes_done(),
                                                     self.handle->bytes_total());
                             })
      .def(
          "wait",
          [](T& self, std::optional<double> timeout) {
            Reader& reader = *self.handle;
            return patiently(timeout, [&](double seconds) { return reader.wait(seconds); });
          },
          py::arg("timeout") = py::none())
      .def(
          "cancel", [](T& self) { self.handle->cancel(); },
          py::call_guard<py::gil_scoped_release>());
}

// ---- writing ----

struct FileWriter {
  Handle<Writer> handle;
};

void register_writer(py::module_& m) {
  py::class_<FileWriter>(m, "FileWriter", py::is_final())
      .def_property_readonly("path",
                             [](const FileWriter& self) { return from_path(self.handle->path()); })
      .def_property_readonly("size", [](const FileWriter& self) { return self.handle->size(); })
      .def_property_readonly("chunk", [](const FileWriter& self) { return self.handle->chunk(); })
      .def_property_readonly("direct", [](const FileWriter& self) { return self.handle->direct(); })
      .def_property_readonly("written",
                             [](const FileWriter& self) { return self.handle->written(); })
      .def(
          "submit",
          [](FileWriter& self, std::uintptr_t address, std::int64_t offset, std::int64_t length) {
            return self.handle->submit(reinterpret_cast<const unsigned char*>(address),
                                       as_count(offset, "offset"), as_count(length, "length"));
          },
          py::arg("buffer_address"), py::arg("offset"), py::arg("length"))
      .def(
          "gather",
          [](FileWriter& self, py::handle extents, std::int64_t offset, std::int64_t length) {
            const ContiguousView view(extents, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT);
            check_rows(view, "extents", 3, "three");
            auto rows = write_extents(static_cast<const std::int64_t*>(view.data()),
                                      view.size() / (3 * sizeof(std::int64_t)));
            return self.handle->gather(std::move(rows), as_count(offset, "offset"),
                                       as_count(length, "length"));
          },
          py::arg("extents"), py::arg("offset"), py::arg("length"))
      .def(
          "done",
          [](const FileWriter& self, std::int64_t ticket) {
            return self.handle->done(as_count(ticket, "ticket"));
          },
          py::arg("ticket"))
      .def(
          "wait",
          [](FileWriter& self, std::int64_t ticket, std::optional<double> timeout) {
            const Ticket number = as_count(ticket, "ticket");
            Writer& writer = *self.handle;
            return patiently(timeout, [&](double seconds) { return writer.wait(number, seconds); });
          },
          py::arg("ticket"), py::arg("timeout") = py::none())
      .def("finish",
           [](FileWriter& self) {
             Writer& writer = *self.handle;
             patiently(std::nullopt, [&](double seconds) { return writer.wait_all(seconds); });
             py::gil_scoped_release release;
             return writer.finish();
           })
      .def("chunk_crcs",
           [](const FileWriter& self) { return little_endian(self.handle->chunk_crcs()); })
      .def(
          "cancel", [](FileWriter& self) { self.handle->cancel(); },
          py::call_guard<py::gil_scoped_release>());
}

// ---- probing ----

py::dict trial_as_dict(const Trial& trial, std::int64_t bytes) {
  const auto rate = [&](double seconds) -> py::object {
    if (seconds == 0) return py::none();
    return py::float_(static_cast<double>(bytes) / seconds / (1 << 30));
  };
  py::dict said;
  said["backend"] = name(trial.options.backend);
  said["direct"] = name(trial.options.direct);
  // None: files in memory have threads of their own.
  const bool own = trial.own_threads;
  said["queue_depth"] = own ? py::object(py::none()) : py::object(py::int_(trial.options.queue_depth));
  said["block_bytes"] = trial.options.block_bytes;
  said["threads"] = own ? py::object(py::none()) : py::object(py::int_(trial.options.threads));
  said["write_gib_s"] = rate(trial.write_seconds);
  said["read_gib_s"] = rate(trial.read_seconds);
  said["error"] = trial.error.empty() ? py::object(py::none()) : py::str(trial.error);
  return said;
}

py::dict run_probe(py::handle directory, double seconds, std::int64_t bytes) {
  if (!(seconds > 0 && seconds <= 3600)) {
    throw py::value_error("seconds is " + std::to_string(seconds) +
                          "; allowed is 0 to 3600, not 0");
  }
  if (bytes < (1 << 20)) {
    throw py::value_error("bytes is " + std::to_string(bytes) + "; allowed is 1048576 and above");
  }
  const std::string name = as_path(directory);
  bool interrupted = false;
  ProbeResult result;
  {
    py::gil_scoped_release release;
    result = probe(name, seconds, static_cast<std::uint64_t>(bytes), [&] {
      py::gil_scoped_acquire acquire;
      interrupted = PyErr_CheckSignals() != 0;
      return !interrupted;
    });
  }
  if (interrupted) throw py::error_already_set();
  py::list trials;
  for (const Trial& trial : result.trials) trials.append(trial_as_dict(trial, bytes));
  // As it was asked: an engine of these options is the one that was measured.
  const Options& best = result.trials[result.choice].asked;
  py::dict choice;
  choice["backend"] = goku::io::name(best.backend);
  // Not "on": that would refuse the files for which it does not work.
  choice["direct"] = goku::io::name(best.direct == Direct::on ? Direct::automatic : best.direct);
  choice["queue_depth"] = best.queue_depth;
  choice["block_bytes"] = best.block_bytes;
  choice["threads"] = best.threads;
  py::dict said;
  said["directory"] = from_path(name);
  said["bytes"] = bytes;
  said["trials"] = trials;
  said["choice"] = choice;
  return said;
}

}  // namespace

void register_engine(py::module_& m) {
  py::class_<ReadStats>(m, "ReadStats", py::is_final())
      .def_readonly("bytes_read", &ReadStats::bytes_read)
      .def_readonly("bytes_wanted", &ReadStats::bytes_wanted)
      .def_readonly("requests", &ReadStats::requests)
      .def("__repr__", [](const ReadStats& self) {
        return "ReadStats(bytes_read=" + std::to_string(self.bytes_read) +
               ", bytes_wanted=" + std::to_string(self.bytes_wanted) +
               ", requests=" + std::to_string(self.requests) + ")";
      });
  register_writer(m);
  register_reading<FileReader>(m, "FileReader");
  register_reading<FileChecksum>(m, "FileChecksum");
  py::reinterpret_borrow<py::class_<FileReader>>(m.attr("FileReader")).def("result", &result);
  py::reinterpret_borrow<py::class_<FileChecksum>>(m.attr("FileChecksum")).def("result", &sums);

  // keep_alive: an engine that nobody holds any more would cancel its files.
  py::class_<Engine>(m, "Engine", py::is_final())
      .def(py::init(&make_engine), py::kw_only(), py::arg("backend") = "auto",
           py::arg("direct") = "auto", py::arg("queue_depth") = 0, py::arg("block_bytes") = 0,
           py::arg("threads") = 0, py::arg("memory_budget") = 0, py::arg("trace") = false)
      .def_property_readonly("backend",
                             [](const Engine& self) { return name(self.chosen().backend); })
      .def_property_readonly("queue_depth",
                             [](const Engine& self) { return self.chosen().queue_depth; })
      .def_property_readonly("block_bytes",
                             [](const Engine& self) { return self.chosen().block_bytes; })
      .def_property_readonly("threads", [](const Engine& self) { return self.chosen().threads; })
      .def("describe", &describe)
      .def("trace", &events)
      .def("close", &Engine::close, py::call_guard<py::gil_scoped_release>())
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__",
           [](Engine& self, const py::args&) {
             py::gil_scoped_release release;
             self.close();
           })
      .def(
          "create",
          [](Engine& self, py::handle path, std::int64_t size, std::int64_t chunk, bool fsync,
             unsigned mode) {
            const std::string name = as_path(path);
            const std::uint64_t bytes = as_count(size, "size");
            const std::uint64_t unit = as_count(chunk, "chunk");
            py::gil_scoped_release release;
            return FileWriter{self.create(name, bytes, unit, fsync, mode)};
          },
          py::arg("path"), py::arg("size"), py::kw_only(), py::arg("chunk") = 65536,
          py::arg("fsync") = true, py::arg("mode") = 0644, py::keep_alive<0, 1>())
      .def("start_read", &start_read, py::arg("path"), py::arg("segments"), py::kw_only(),
           py::arg("chunk"), py::arg("crcs"), py::arg("size"), py::keep_alive<0, 1>())
      .def(
          "read",
          [](Engine& self, py::handle path, py::handle segments, std::int64_t chunk,
             py::handle crcs, std::int64_t size) {
            FileReader reader = start_read(self, path, segments, chunk, crcs, size);
            return result(reader);
          },
          py::arg("path"), py::arg("segments"), py::kw_only(), py::arg("chunk"), py::arg("crcs"),
          py::arg("size"))
      .def("start_checksum", &start_checksum, py::arg("path"), py::kw_only(),
           py::arg("chunk") = 65536, py::keep_alive<0, 1>())
      .def(
          "checksum",
          [](Engine& self, py::handle path, std::int64_t chunk) {
            FileChecksum checksum = start_checksum(self, path, chunk);
            return sums(checksum);
          },
          py::arg("path"), py::kw_only(), py::arg("chunk") = 65536);
  m.def("probe", &run_probe, py::arg("directory"), py::kw_only(), py::arg("seconds") = 1.0,
        py::arg("bytes") = 64 << 20);
}

}  // namespace goku::io
