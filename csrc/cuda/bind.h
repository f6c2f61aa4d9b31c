#pragma once

#include <pybind11/pybind11.h>

namespace normwear::cuda {

// Adds the CUDA operators to a module, by address: sizes, types and devices are checked in Python.
void bind(pybind11::module_& m);

}  // namespace normwear::cuda
