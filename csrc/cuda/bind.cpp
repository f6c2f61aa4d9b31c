// The CUDA operators for Python: a launch's fields by name, addresses and the stream as integers.
#include "bind.h"

#include <cstdint>

#include "launch.h"

namespace py = pybind11;

namespace normwear::cuda {

namespace {

// Takes field after field out of a dictionary, and refuses one that is left over.
class Fields {
public:
    explicit Fields(const py::dict& fields) : fields_(fields) {}

    template <class T>
    Fields& take(const char* name, T& field) {
        field = fields_[name].cast<T>();
        ++taken_;
        return *this;
    }

    template <class T>
    Fields& take(const char* name, T*& field) {
        field = reinterpret_cast<T*>(fields_[name].cast<std::uintptr_t>());
        ++taken_;
        return *this;
    }

    void end() const {
        if (taken_ != fields_.size()) throw py::key_error("a field that no launch has");
    }

private:
    const py::dict& fields_;
    std::size_t taken_ = 0;
};

template <class Call>
void launch(void (*run)(const Call&, std::uintptr_t), const Call& call, std::uintptr_t stream) {
    py::gil_scoped_release release;
    run(call, stream);
}

}  // namespace

void bind(py::module_& m) {
    m.def(
        "cuda_residual_norm",
        [](const py::dict& fields, std::uintptr_t stream) {
            ResidualNorm call;
            Fields(fields)
                .take("residual", call.residual)
                .take("update", call.update)
                .take("carried", call.carried)
                .take("out", call.out)
                .take("scale", call.scale)
                .take("rows", call.rows)
                .take("width", call.width)
                .take("residual_type", call.residual_type)
                .take("update_type", call.update_type)
                .take("out_type", call.out_type)
                .take("eps", call.eps)
                .end();
            launch(residual_norm, call, stream);
        },
        py::arg("fields"), py::arg("stream"));

    m.def(
        "cuda_tokenize",
        [](const py::dict& fields, std::uintptr_t stream) {
            Tokenize call;
            Fields(fields)
                .take("series", call.series)
                .take("cu_samples", call.cu_samples)
                .take("cu_tokens", call.cu_tokens)
                .take("sequences_at", call.sequences_at)
                .take("bank_columns", call.bank_columns)
                .take("bank_taps", call.bank_taps)
                .take("weights", call.weights)
                .take("templates", call.templates)
                .take("residual", call.residual)
                .take("sequences", call.sequences)
                .take("tiles", call.tiles)
                .take("columns", call.columns)
                .take("width", call.width)
                .take("lead", call.lead)
                .take("span", call.span)
                .take("residual_type", call.residual_type)
                .take("tf32", call.tf32)
                .end();
            launch(tokenize, call, stream);
        },
        py::arg("fields"), py::arg("stream"));

    m.def(
        "cuda_linear_float8",
        [](const py::dict& fields, std::uintptr_t stream) {
            LinearFloat8 call;
            Fields(fields)
                .take("x", call.x)
                .take("x_scale", call.x_scale)
                .take("weight", call.weight)
                .take("pairs", call.pairs)
                .take("out", call.out)
                .take("rows", call.rows)
                .take("columns", call.columns)
                .take("parts", call.parts)
                .take("blocks", call.blocks)
                .end();
            launch(linear_float8, call, stream);
        },
        py::arg("fields"), py::arg("stream"));

    m.def(
        "cuda_linear",
        [](const py::dict& fields, std::uintptr_t stream) {
            Linear call;
            Fields(fields)
                .take("x", call.x)
                .take("weight", call.weight)
                .take("bias", call.bias)
                .take("x_scale", call.x_scale)
                .take("scale", call.scale)
                .take("out", call.out)
                .take("rows", call.rows)
                .take("columns", call.columns)
                .take("inner", call.inner)
                .take("epilogue", call.epilogue)
                .take("bias_type", call.bias_type)
                .take("blocks", call.blocks)
                .end();
            launch(linear, call, stream);
        },
        py::arg("fields"), py::arg("stream"));

    m.def("cuda_hopper_runs", &hopper_runs);

    m.def("cuda_ingest_runs", &ingest_runs);

    m.def(
        "cuda_ingest",
        [](const py::dict& fields, std::uintptr_t stream) {
            Ingest call;
            Fields(fields)
                .take("raw", call.raw)
                .take("channel_stride", call.channel_stride)
                .take("sample_stride", call.sample_stride)
                .take("samples", call.samples)
                .take("starts", call.starts)
                .take("lengths", call.lengths)
                .take("offsets", call.offsets)
                .take("gain", call.gain)
                .take("baseline", call.baseline)
                .take("invalid", call.invalid)
                .take("filters", call.filters)
                .take("first", call.first)
                .take("phase", call.phase)
                .take("weights", call.weights)
                .take("statistics", call.statistics)
                .take("smoothing", call.smoothing)
                .take("out", call.out)
                .take("missing", call.missing)
                .take("flags", call.flags)
                .take("scratch", call.scratch)
                .take("windows", call.windows)
                .take("channels", call.channels)
                .take("outputs", call.outputs)
                .take("taps", call.taps)
                .take("phases", call.phases)
                .take("longest", call.longest)
                .take("raw_type", call.raw_type)
                .take("hold", call.hold)
                .take("reference", call.reference)
                .take("normalize", call.normalize)
                .take("rate", call.rate)
                .take("target_rate", call.target_rate)
                .end();
            launch(ingest, call, stream);
        },
        py::arg("fields"), py::arg("stream"));
}

}  // namespace normwear::cuda
