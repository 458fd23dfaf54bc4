// Host module: what a person wants to know about this processor and this build. The operators load without it.
#include <pybind11/pybind11.h>

#include "build_facts.h"
#include "cpu/isa.h"

namespace py = pybind11;
using namespace bertkern;

PYBIND11_MODULE(_host, m) {
  m.doc() = "Processor features, build facts and peak probes.";
  m.def("build_facts", [] { return kBuildFacts; }, "Facts of this build, as JSON.");
  m.def("detected_isa", [] { return cpu::isa_name(cpu::detected_isa()); }, "Best level that this processor has.");
}
