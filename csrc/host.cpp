// Host module: what a person wants to know about this processor and this build. The operators load without it; it ties
// to one version of Python, they do not.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <thread>

#include "build_facts.h"
#include "cpu/isa.h"
#include "cpu/probe/probe.h"

namespace py = pybind11;
using namespace py::literals;
using namespace bertkern::cpu;

namespace {

py::dict cpu() {
  const CacheSizes& caches = cache_sizes();
  return py::dict("brand"_a = cpu_brand(), "cores"_a = std::thread::hardware_concurrency(),
                  "isa"_a = isa_name(detected_isa()), "l1d"_a = caches.l1d, "l2"_a = caches.l2, "l3"_a = caches.l3);
}

// The operators' library warns of a cap that the processor cannot meet; one warning is enough.
Isa level() { return active_isa(/*warn=*/false); }

void check_threads(const char* function, int threads) {
  if (threads >= 1 && threads <= 4096) return;
  throw std::invalid_argument(std::string(function) + ": expected threads in [1, 4096]. Got " +
                              std::to_string(threads) + ".");
}

double peak(const std::string& dtype, int threads, double seconds) {
  check_threads("peak", threads);
  if (dtype == "int8") return probe::peak(probe::Type::int8, level(), threads, seconds);
  if (dtype == "bf16") return probe::peak(probe::Type::bf16, level(), threads, seconds);
  if (dtype == "fp32") return probe::peak(probe::Type::fp32, level(), threads, seconds);
  throw std::invalid_argument("peak: expected dtype int8, bf16 or fp32. Got '" + dtype + "'.");
}

double read_bandwidth(int threads, std::size_t megabytes) {
  check_threads("read_bandwidth", threads);
  return probe::read_bandwidth(level(), threads, megabytes << 20);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Processor features, build facts and peak probes.";
  m.def("cpu", &cpu,
        "Brand, logical cores, best ISA level and cache sizes in bytes (one instance of each), as a dict.");
  m.def(
      "active_isa", [] { return isa_name(level()); },
      "The level in use after the cap BERTKERN_CPU_ISA. RuntimeError where that names no level.");
  m.def("build_facts", [] { return kBuildFacts; }, "Compiler, flags and versions of this build, as JSON.");
  m.def("peak", &peak, "dtype"_a, "threads"_a = 1, "seconds"_a = 0.005, py::call_guard<py::gil_scoped_release>(),
        "10^9 multiply-accumulates a second of these threads together, on registers alone, at the active ISA level.\n\n"
        "dtype: 'int8', 'bf16' (fp32 arithmetic where the level has no bf16 instructions) or 'fp32'.");
  m.def("read_bandwidth", &read_bandwidth, "threads"_a = 1, "megabytes"_a = 0, py::call_guard<py::gil_scoped_release>(),
        "10^9 bytes a second read from memory by these threads together, over a buffer of this many MiB.\n\n"
        "megabytes: 0 takes four times the last-level cache.");
}
