#pragma once

#include <pybind11/pybind11.h>

namespace normwear {

// Adds the operators of kernels.h to the module.
void bind_kernels(pybind11::module_& m);

}  // namespace normwear
