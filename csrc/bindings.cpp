// normwear_fast._C: the native operators by pointer, size and stride. Nothing here knows PyTorch or
// NumPy: the Python side checks dtype, shape, contiguity and lifetime, and passes addresses.

#include <pybind11/pybind11.h>

#include <cstdint>

#include "build_info.h"  // written by setup.py
#include "cpu/bind_kernels.h"
#include "cpu/windows.h"
#include "cuda/bind.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    using std::int64_t;
    using std::uintptr_t;

    m.doc() = "Native operators of normwear_fast; addresses are not checked here.";
    m.attr("BUILD_ID") = NORMWEAR_BUILD_ID;
    m.attr("PYTHON_ID") = NORMWEAR_PYTHON_ID;
    m.attr("COMPILER") = NORMWEAR_COMPILER;
    m.attr("FLAGS") = NORMWEAR_FLAGS;
#ifdef NORMWEAR_CUDA
    m.attr("CUDA") = true;
    m.attr("CUDA_ARCHITECTURES") = NORMWEAR_CUDA;
    normwear::cuda::bind(m);
#else
    m.attr("CUDA") = false;
    m.attr("CUDA_ARCHITECTURES") = "";
#endif
#ifdef _OPENMP
    m.attr("OPENMP") = true;
#else
    m.attr("OPENMP") = false;
#endif

    m.def(
        "gather_windows",
        [](uintptr_t block, int64_t n, int64_t stride, uintptr_t starts, int64_t count,
           int64_t length, uintptr_t windows, uintptr_t missing, bool fill) {
            normwear::gather_windows(pointer<const double>(block), n, stride,
                                     pointer<const int64_t>(starts), count, length,
                                     pointer<double>(windows), pointer<int64_t>(missing), fill);
        },
        py::arg("block"), py::arg("n"), py::arg("stride"), py::arg("starts"), py::arg("count"),
        py::arg("length"), py::arg("windows"), py::arg("missing"), py::arg("fill"),
        py::call_guard<py::gil_scoped_release>());

    m.def(
        "fill_missing",
        [](uintptr_t windows, int64_t count, int64_t length, int64_t stride, uintptr_t missing) {
            normwear::fill_missing(pointer<double>(windows), count, length, stride,
                                   pointer<int64_t>(missing));
        },
        py::arg("windows"), py::arg("count"), py::arg("length"), py::arg("stride"),
        py::arg("missing"), py::call_guard<py::gil_scoped_release>());

    normwear::bind_kernels(m);
}
