// csrc/cuda for the host: the same kernel bodies, a thread block after the other and in each the
// threads one by one, up or down. A barrier that is missing between a write and a read of another
// thread's value shows as a difference between the two orders.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/bind.h"
#include "cuda/ingest.cuh"
#include "cuda/residual_norm.cuh"
#include "cuda/tokenize.cuh"

namespace normwear::cuda {

namespace {

bool downward = false;
int threads_now = 0;

struct HostBlock {
    template <class T>
    struct Each {
        std::vector<T> values = std::vector<T>(static_cast<std::size_t>(threads_now));
        T& operator[](int thread) { return values.at(static_cast<std::size_t>(thread)); }
    };

    int number;
    int index() const { return number; }
    void sync() const {}

    template <class F>
    void threads(F&& f) const {
        for (int i = 0; i < threads_now; ++i) f(downward ? threads_now - 1 - i : i);
    }
    template <class F>
    void each(F&& f) const {
        threads(f);
    }

    template <class Combine>
    void butterfly(Each<float>& x, Combine combine) const {
        for (int lanes = 16; lanes > 0; lanes /= 2) {
            const std::vector<float> old = x.values;
            for (int i = 0; i < threads_now; ++i) x[i] = combine(old[i], old[i ^ lanes]);
        }
    }
    void warp_sum(Each<float>& x) const {
        butterfly(x, [](float a, float b) { return a + b; });
    }
    void warp_max(Each<float>& x) const {
        butterfly(x, [](float a, float b) { return a > b ? a : b; });
    }
    void add(int* counter) const { ++*counter; }

    // PTX ISA, "Matrix Fragments for mma.m16n8k8" with .tf32: with g = lane / 4 and t = lane % 4,
    // a0 (g, t), a1 (g + 8, t), a2 (g, t + 4), a3 (g + 8, t + 4); b0 (t, g), b1 (t + 4, g);
    // c0 (g, 2 t), c1 (g, 2 t + 1), c2 (g + 8, 2 t), c3 (g + 8, 2 t + 1).
    template <class Sums, class Left, class Right>
    void mma(Each<Sums>& c, Each<Left>& a, Each<Right>& b) const {
        for (int warp = 0; warp < threads_now; warp += 32) {
            for (int i = 0; i < Sums::rows; ++i) {
                for (int j = 0; j < Sums::columns; ++j) {
                    float left[16][8], right[8][8];
                    for (int lane = 0; lane < 32; ++lane) {
                        const int g = lane / 4, t = lane % 4;
                        const std::uint32_t* l = a[warp + lane].x[i];
                        const std::uint32_t* r = b[warp + lane].x[j];
                        for (int k = 0; k < 4; ++k) {
                            left[g + 8 * (k % 2)][t + 4 * (k / 2)] = tf32(l[k]);
                        }
                        for (int k = 0; k < 2; ++k) right[t + 4 * k][g] = tf32(r[k]);
                    }
                    for (int lane = 0; lane < 32; ++lane) {
                        const int g = lane / 4, t = lane % 4;
                        for (int k = 0; k < 4; ++k) {
                            float& sum = c[warp + lane].x[i][j][k];
                            for (int m = 0; m < 8; ++m) {
                                sum += left[g + 8 * (k / 2)][m] * right[m][2 * t + k % 2];
                            }
                        }
                    }
                }
            }
        }
    }

    // The tensor cores read 19 bits: a value that was not rounded would lose the others.
    static float tf32(std::uint32_t bits) {
        if (bits & 0x1fffu) throw std::logic_error("an operand of mma was not rounded to TF32");
        return bits_float(bits);
    }
};

// Shared memory is poisoned, as a GPU's holds what was there before.
template <class Body>
void run(std::int64_t blocks, int threads, std::int64_t shared_bytes, Body body) {
    threads_now = threads;
    auto* shared = static_cast<char*>(
        std::aligned_alloc(16, static_cast<std::size_t>((shared_bytes + 31) / 16 * 16)));
    for (std::int64_t i = 0; i < blocks; ++i) {
        std::memset(shared, 0xff, static_cast<std::size_t>(shared_bytes));
        HostBlock block{static_cast<int>(downward ? blocks - 1 - i : i)};
        body(block, shared);
    }
    std::free(shared);
}

template <class Residual, class Update>
void norm(const ResidualNorm& call) {
    with_norm_shape(call.width, [&](auto shape) {
        using Shape = decltype(shape);
        run((call.rows + Shape::rows - 1) / Shape::rows, norm_threads, 16,
            [&](HostBlock& block, char* shared) {
                residual_norm_body<HostBlock, Residual, Update, Shape::values, Shape::loads,
                                   Shape::warps>(block, call, reinterpret_cast<float*>(shared));
            });
    });
}

template <class Residual, bool Tf32>
void tokens(const Tokenize& call) {
    run(static_cast<std::int64_t>(call.sequences) * call.tiles, tokenize_threads,
        tokenize_shared_bytes(call.span), [&](HostBlock& block, char* shared) {
            tokenize_body<Residual, Tf32>(block, call, reinterpret_cast<float*>(shared));
        });
}

}  // namespace

void residual_norm(const ResidualNorm& call, std::uintptr_t order) {
    downward = order != 0;
    const bool narrow = call.residual_type == type_bfloat16;
    const bool narrow_update = call.update_type == type_bfloat16;
    if (narrow && narrow_update) norm<bfloat16, bfloat16>(call);
    if (narrow && !narrow_update) norm<bfloat16, float>(call);
    if (!narrow && narrow_update) norm<float, bfloat16>(call);
    if (!narrow && !narrow_update) norm<float, float>(call);
}

void tokenize(const Tokenize& call, std::uintptr_t order) {
    downward = order != 0;
    const bool narrow = call.residual_type == type_bfloat16;
    if (narrow && call.tf32) tokens<bfloat16, true>(call);
    if (narrow && !call.tf32) tokens<bfloat16, false>(call);
    if (!narrow && call.tf32) tokens<float, true>(call);
    if (!narrow && !call.tf32) tokens<float, false>(call);
}

void ingest(const Ingest& call, std::uintptr_t order) {
    downward = order != 0;
    const std::int64_t values =
        call.scratch == nullptr ? ingest_values(call.longest, call.outputs) : 0;
    if (values > ingest_shared_values) throw std::runtime_error("ingest: scratch is needed");
    run(static_cast<std::int64_t>(call.windows) * call.channels, ingest_threads,
        static_cast<std::int64_t>(sizeof(IngestShared)) + 8 * values,
        [&](HostBlock& block, char* shared) {
            ingest_body(block, call, *reinterpret_cast<IngestShared*>(shared),
                        reinterpret_cast<double*>(shared + sizeof(IngestShared)));
        });
}

}  // namespace normwear::cuda

PYBIND11_MODULE(cuda_emulation, m) {
    using namespace normwear::cuda;
    bind(m);
    // float32 values at an address, rounded as the kernels round them, as bits in 32-bit words.
    m.def("round", [](const std::string& type, std::uintptr_t from, std::uintptr_t to, int count) {
        const auto* x = reinterpret_cast<const float*>(from);
        auto* bits = reinterpret_cast<std::uint32_t*>(to);
        for (int i = 0; i < count; ++i) {
            bits[i] = type == "float8"     ? float8_bits(x[i])
                      : type == "bfloat16" ? bfloat16_bits(x[i])
                                           : float_bits(to_tf32(x[i]));
        }
    });
}
