// The operators of kernels.h for Python, by address. Views are (address, row stride, type) triples. An address is
// believed (normwear_fast/native.py checks the tensors); sizes, tables and matrices that cannot belong together are
// a ValueError, and memory that is not there a MemoryError.

#include "bind_kernels.h"

#include <pybind11/stl.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>
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

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

void require_sizes(std::initializer_list<int64_t> sizes) {
    for (const int64_t size : sizes) require(size >= 0, "a size is negative");
}

View view(const Triple& t) {
    const auto [address, stride, type] = t;
    require(type == 0 || type == 1, "a view's type is 0 (float32) or 1 (bfloat16)");
    require(stride >= 0, "a view's stride is negative");
    return {pointer<void>(address), stride, static_cast<Type>(type)};
}

// Bounds of segments: from 0 on, none before the one in front of it, each at least `least` long.
const int64_t* bounds(uintptr_t address, int64_t segments, int64_t least = 0) {
    const auto* at = pointer<const int64_t>(address);
    require_sizes({segments});
    require(at[0] >= 0, "segments start before the first row");
    for (int64_t i = 0; i < segments; ++i) {
        require(at[i + 1] >= at[i] && at[i + 1] - at[i] >= least, "segments out of order, or one that is too short");
    }
    return at;
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
    require(operand >= 0 && operand <= 2, "an operand is 0 (float32), 1 (bfloat16) or 2 (int8)");
    require(n > 0 && k > 0 && stride >= 0, "a matrix has at least one output and one input");
    if (n > (int64_t{1} << 48) / k) throw std::bad_alloc();
    const auto op = static_cast<Operand>(operand);
    // Sums of int8 are 32 bits: 66,311 products of 255 and 127 at most.
    chunk = std::min<int64_t>(chunk, 1 << 16);
    require(chunk > 0 && (chunk >= k || chunk % 64 == 0), "a chunk must be a multiple of 64");
    const int64_t words = set.packed_words(op, k), panels = (n + set.lanes - 1) / set.lanes;
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
                require_sizes({rows});
                require(!(standardise || gelu) || weight.packed.chunk >= weight.packed.k,
                        "rows in chunks cannot be standardised, nor take a gelu");
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
                const Packed &p = proj.packed, &f = fc1.packed, &g = fc2.packed;
                require_sizes({rows});
                require(p.operand == f.operand && p.operand == g.operand, "matrices of several operands");
                require(f.k == p.n && g.k == f.n && g.n == p.n, "matrices that do not follow one another");
                require(f.chunk >= f.k, "rows in chunks cannot be standardised");
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
                require(heads > 0 && head_size > 0, "no heads, or heads of no size");
                const View q = view(query), kv = view(key_value), o = view(out);
                require(q.type == kv.type && q.type == o.type, "queries, keys and output of several types");
                set.attention({q, kv, o, bounds(queries, segments), bounds(keys, segments, 1), segments, heads, head_size},
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
                require_sizes({sequences});
                require(columns > 0 && patch_rows > 0 && patch_scales > 0, "patches of no size");
                const Packed& w = weight.packed;
                require(w.operand == Operand::float32 && w.n == width && w.k == 3 * patch_rows * patch_scales,
                        "a patch matrix of another size");
                const auto *samples_of = bounds(samples, sequences, 3), *tokens_of = bounds(tokens, sequences, 1);
                const auto* entries = pointer<const int64_t>(table);
                for (int64_t i = 0; i < sequences; ++i) {
                    require(entries[i] >= 0 && entries[i] < static_cast<int64_t>(filters.size()), "no such filters");
                    require((tokens_of[i + 1] - tokens_of[i]) % columns == 1 % columns, "tokens that are no grid");
                }
                set.tokenize({pointer<const float>(series), samples_of, tokens_of, sequences, entries, taps.data(),
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
                require_sizes({rows, width});
                set.residual_norm({pointer<float>(residual), view(update), pointer<const float>(carried), eps, rows,
                                   width, view(out)},
                                  threads);
            },
            py::arg("residual"), py::arg("update"), py::arg("carried"), py::arg("eps"), py::arg("rows"),
            py::arg("width"), py::arg("out"), py::arg("threads"), unlocked)
        .def(
            "bias_gelu",
            [](const Kernels& set, Triple x, uintptr_t bias, int64_t rows, int64_t width, int threads) {
                require_sizes({rows, width});
                set.bias_gelu(view(x), pointer<const float>(bias), rows, width, threads);
            },
            py::arg("x"), py::arg("bias"), py::arg("rows"), py::arg("width"), py::arg("threads"), unlocked)
        .def(
            "quantise",
            [](const Kernels& set, Triple x, uintptr_t bias, int64_t rows, int64_t width, uintptr_t out,
               uintptr_t scale, uintptr_t offset, int threads) {
                require(rows >= 0 && width > 0, "rows of no size");
                set.quantise({view(x), pointer<const float>(bias), rows, width, pointer<std::uint8_t>(out),
                              pointer<float>(scale), pointer<float>(offset)},
                             threads);
            },
            py::arg("x"), py::arg("bias"), py::arg("rows"), py::arg("width"), py::arg("out"), py::arg("scale"),
            py::arg("offset"), py::arg("threads"), unlocked)
        .def(
            "pool_norm",
            [](const Kernels& set, uintptr_t residual, Triple update, uintptr_t carried, uintptr_t weight,
               uintptr_t bias, float eps, uintptr_t segments, int64_t sequences, int64_t width, int pool, uintptr_t out,
               int threads) {
                require_sizes({width});
                require(pool >= 0 && pool <= 2, "a pool is 0 (mean), 1 (cls) or 2 (patch)");
                set.pool_norm({pointer<const float>(residual), view(update), pointer<const float>(carried),
                               pointer<const float>(weight), pointer<const float>(bias), eps,
                               bounds(segments, sequences, pool == 2 ? 0 : 1), sequences, width, pool, pointer<float>(out)},
                              threads);
            },
            py::arg("residual"), py::arg("update"), py::arg("carried"), py::arg("weight"), py::arg("bias"),
            py::arg("eps"), py::arg("segments"), py::arg("sequences"), py::arg("width"), py::arg("pool"),
            py::arg("out"), py::arg("threads"), unlocked);

    m.def(
        "kernels", [](const std::string& name) { return kernels(name.c_str()); }, py::arg("name"),
        py::return_value_policy::reference,
        "The operators of an instruction set, or None where this build or processor lacks it.");
}

}  // namespace normwear
