// The operators of kernels.h for Python, by address. Views are (address, row stride, type) triples.

#include "bind_kernels.h"

#include <pybind11/stl.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace normwear {

namespace {

using std::int64_t;
using std::uintptr_t;
using Triple = std::tuple<uintptr_t, int64_t, int>;

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

View view(const Triple& t) {
    return {pointer<void>(std::get<0>(t)), std::get<1>(t), static_cast<Type>(std::get<2>(t))};
}

struct Free {
    void operator()(void* p) const { std::free(p); }
};

// Large arrays lie on huge pages where the system gives them: a product walks through all of a weight for
// every block of rows, 7 to 9 MB, more than the processor's address caches hold in pages of 4 KB. The last,
// partly used huge page is left small.
template <typename T>
std::unique_ptr<T, Free> aligned(int64_t count) {
    constexpr std::size_t huge = 2 << 20;
    const std::size_t size = static_cast<std::size_t>(count) * sizeof(T), alignment = size >= huge ? huge : 64;
    auto* p = static_cast<T*>(std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment));
    if (!p) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (size >= huge) madvise(p, size / huge * huge, MADV_HUGEPAGE);
#endif
    return std::unique_ptr<T, Free>(p);
}

// A packed weight that owns its memory.
struct Matrix {
    const Kernels* set;
    Packed packed;
    std::unique_ptr<std::uint32_t, Free> data;
    std::unique_ptr<float, Free> scale, sums;
    int64_t bytes;
};

const Packed& of(const Matrix& m, const Kernels& set) {
    if (m.set != &set) throw std::invalid_argument("a matrix was packed for another instruction set");
    return m.packed;
}

std::unique_ptr<Matrix> pack(const Kernels& set, uintptr_t weight, int64_t n, int64_t k, int64_t stride, int operand,
                             int64_t chunk, int threads) {
    const auto op = static_cast<Operand>(operand);
    const int64_t words = set.packed_words(op, k), panels = (n + set.lanes - 1) / set.lanes;
    if (chunk < 1 || (chunk < k && chunk % 64)) throw std::invalid_argument("a chunk must be a multiple of 64");
    auto m = std::make_unique<Matrix>();
    m->set = &set;
    m->data = aligned<std::uint32_t>(panels * words * set.lanes);
    m->bytes = panels * words * set.lanes * 4;
    if (op == Operand::int8) {
        m->scale = aligned<float>(panels * set.lanes);
        m->sums = aligned<float>((k + chunk - 1) / chunk * panels * set.lanes);
    }
    m->packed = {op, n, k, words, panels, op == Operand::int8 ? chunk : k, m->data.get(), m->scale.get(), m->sums.get()};
    set.pack(pointer<const float>(weight), stride, m->data.get(), m->scale.get(), m->sums.get(), m->packed, threads);
    return m;
}

}  // namespace

void bind_kernels(py::module_& m) {
    const auto unlocked = py::call_guard<py::gil_scoped_release>();

    py::class_<Matrix>(m, "Matrix", "A weight packed for one instruction set.")
        .def_readonly("bytes", &Matrix::bytes)
        .def_property_readonly("shape", [](const Matrix& w) { return std::make_pair(w.packed.n, w.packed.k); });

    py::class_<Kernels, std::unique_ptr<Kernels, py::nodelete>>(m, "Kernels", "The operators of one instruction set.")
        .def_property_readonly("name", [](const Kernels& k) { return std::string(k.name); })
        .def_readonly("lanes", &Kernels::lanes)
        .def_readonly("largest_weight", &Kernels::largest_weight)
        .def_readonly("native_bfloat16", &Kernels::native_bfloat16)
        .def("pack", &pack, py::arg("weight"), py::arg("n"), py::arg("k"), py::arg("stride"), py::arg("operand"),
             py::arg("chunk"), py::arg("threads"), unlocked)
        .def(
            "linear",
            [](const Kernels& set, Triple a, bool standardise, uintptr_t carried, float eps, const Matrix& weight,
               uintptr_t bias, bool gelu, bool accumulate, Triple c, int64_t rows, int threads) {
                set.linear({view(a), standardise, pointer<const float>(carried), eps, of(weight, set),
                            pointer<const float>(bias), gelu, accumulate, view(c), rows},
                           threads);
            },
            py::arg("a"), py::arg("standardise"), py::arg("carried"), py::arg("eps"), py::arg("weight"),
            py::arg("bias"), py::arg("gelu"), py::arg("accumulate"), py::arg("c"), py::arg("rows"), py::arg("threads"),
            unlocked)
        .def(
            "feed",
            [](const Kernels& set, uintptr_t residual, Triple attended, int64_t rows, const Matrix& proj,
               const Matrix& fc1, const Matrix& fc2, uintptr_t carried, uintptr_t fc1_bias, float eps, int threads) {
                set.feed({pointer<float>(residual), view(attended), rows, of(proj, set), of(fc1, set), of(fc2, set),
                          pointer<const float>(carried), pointer<const float>(fc1_bias), eps},
                         threads);
            },
            py::arg("residual"), py::arg("attended"), py::arg("rows"), py::arg("proj"), py::arg("fc1"), py::arg("fc2"),
            py::arg("carried"), py::arg("fc1_bias"), py::arg("eps"), py::arg("threads"), unlocked)
        .def(
            "attention",
            [](const Kernels& set, Triple query, Triple key_value, Triple out, uintptr_t queries, uintptr_t keys,
               int64_t segments, int64_t heads, int64_t head_size, int threads) {
                set.attention({view(query), view(key_value), view(out), pointer<const int64_t>(queries),
                               pointer<const int64_t>(keys), segments, heads, head_size},
                              threads);
            },
            py::arg("query"), py::arg("key_value"), py::arg("out"), py::arg("queries"), py::arg("keys"),
            py::arg("segments"), py::arg("heads"), py::arg("head_size"), py::arg("threads"), unlocked)
        .def(
            "tokenize",
            [](const Kernels& set, uintptr_t series, uintptr_t samples, uintptr_t tokens, uintptr_t table,
               int64_t sequences, const std::vector<std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t>>& filters,
               int64_t columns, int64_t patch_rows, int64_t patch_scales, const Matrix& weight, uintptr_t residual,
               int64_t width, int threads) {
                std::vector<const float*> taps, templates;
                std::vector<const int64_t*> spans;
                std::vector<int64_t> padding;
                for (const auto& [tap, span, rows, zeros] : filters) {
                    taps.push_back(pointer<const float>(tap));
                    spans.push_back(pointer<const int64_t>(span));
                    templates.push_back(pointer<const float>(rows));
                    padding.push_back(zeros);
                }
                set.tokenize({pointer<const float>(series), pointer<const int64_t>(samples),
                              pointer<const int64_t>(tokens), sequences, pointer<const int64_t>(table), taps.data(),
                              spans.data(), padding.data(), templates.data(), columns, patch_rows, patch_scales,
                              of(weight, set), pointer<float>(residual), width},
                             threads);
            },
            py::arg("series"), py::arg("samples"), py::arg("tokens"), py::arg("table"), py::arg("sequences"),
            py::arg("filters"), py::arg("columns"), py::arg("patch_rows"), py::arg("patch_scales"), py::arg("weight"),
            py::arg("residual"), py::arg("width"), py::arg("threads"), unlocked)
        .def(
            "residual_norm",
            [](const Kernels& set, uintptr_t residual, Triple update, uintptr_t carried, float eps, int64_t rows,
               int64_t width, Triple out, int threads) {
                set.residual_norm({pointer<float>(residual), view(update), pointer<const float>(carried), eps, rows,
                                   width, view(out)},
                                  threads);
            },
            py::arg("residual"), py::arg("update"), py::arg("carried"), py::arg("eps"), py::arg("rows"),
            py::arg("width"), py::arg("out"), py::arg("threads"), unlocked)
        .def(
            "bias_gelu",
            [](const Kernels& set, Triple x, uintptr_t bias, int64_t rows, int64_t width, int threads) {
                set.bias_gelu(view(x), pointer<const float>(bias), rows, width, threads);
            },
            py::arg("x"), py::arg("bias"), py::arg("rows"), py::arg("width"), py::arg("threads"), unlocked)
        .def(
            "quantise",
            [](const Kernels& set, Triple x, uintptr_t bias, int64_t rows, int64_t width, uintptr_t out,
               uintptr_t scale, uintptr_t offset, int threads) {
                set.quantise({view(x), pointer<const float>(bias), rows, width, pointer<std::uint8_t>(out),
                              pointer<float>(scale), pointer<float>(offset)},
                             threads);
            },
            py::arg("x"), py::arg("bias"), py::arg("rows"), py::arg("width"), py::arg("out"), py::arg("scale"),
            py::arg("offset"), py::arg("threads"), unlocked)
        .def(
            "pool_norm",
            [](const Kernels& set, uintptr_t residual, Triple update, uintptr_t carried, uintptr_t weight,
               uintptr_t bias, float eps, uintptr_t bounds, int64_t sequences, int64_t width, int pool, uintptr_t out,
               int threads) {
                set.pool_norm({pointer<const float>(residual), view(update), pointer<const float>(carried),
                               pointer<const float>(weight), pointer<const float>(bias), eps,
                               pointer<const int64_t>(bounds), sequences, width, pool, pointer<float>(out)},
                              threads);
            },
            py::arg("residual"), py::arg("update"), py::arg("carried"), py::arg("weight"), py::arg("bias"),
            py::arg("eps"), py::arg("bounds"), py::arg("sequences"), py::arg("width"), py::arg("pool"),
            py::arg("out"), py::arg("threads"), unlocked);

    m.def(
        "kernels", [](const std::string& name) { return kernels(name.c_str()); }, py::arg("name"),
        py::return_value_policy::reference,
        "The operators of an instruction set, or None where this build or processor lacks it.");
}

}  // namespace normwear
