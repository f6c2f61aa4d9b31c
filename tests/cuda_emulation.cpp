// csrc/cuda for the host: the same kernel bodies, each thread of a thread block a context of its own
// that runs until a barrier, in ascending or descending order. As on a GPU, nothing but a barrier makes
// a thread wait for another one: where one is missing between a write and a read of shared memory, one
// of the two orders reads what was there before, which is poison.
#include <pybind11/pybind11.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdlib>
#include <exception>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/bind.h"
#include "cuda/ingest.cuh"
#include "cuda/linear.cuh"
#include "cuda/residual_norm.cuh"
#include "cuda/tokenize.cuh"

namespace normwear::cuda {

namespace {

bool downward = false;

enum class Waits { nothing, warp, block, finished };

struct Thread {
    ucontext_t context;
    jmp_buf place;
    bool started = false;
    std::vector<char> stack = std::vector<char>(1 << 17);
    Waits waits = Waits::nothing;
    float lane = 0;  // what a warp's threads show each other
    std::uint32_t left[2][4], right[4][2];
};

std::vector<Thread> team;
jmp_buf scheduler;
int now = 0;  // the thread that runs
std::function<void()> kernel;
std::exception_ptr failure;

// Contexts are entered once and then left and taken up by jumps, which unlike swapcontext make no
// system call: a run of the tests switches some ten million times.
void wait(Waits barrier) {
    Thread& me = team[static_cast<std::size_t>(now)];
    me.waits = barrier;
    if (_setjmp(me.place) == 0) _longjmp(scheduler, 1);
}

void resume(Thread& thread) {
    if (_setjmp(scheduler) != 0) return;
    if (thread.started) _longjmp(thread.place, 1);
    thread.started = true;
    setcontext(&thread.context);
}

void entry() {
    while (true) {
        try {
            kernel();
        } catch (...) {
            failure = std::current_exception();
        }
        wait(Waits::finished);
    }
}

// Whether all of the threads first .. last wait for the barrier; then they no longer do.
bool release(int first, int last, Waits barrier) {
    for (int i = first; i < last; ++i) {
        if (team[static_cast<std::size_t>(i)].waits != barrier) return false;
    }
    for (int i = first; i < last; ++i) team[static_cast<std::size_t>(i)].waits = Waits::nothing;
    return true;
}

void run_block(int threads) {
    while (team.size() < 256) {
        team.reserve(256);  // contexts do not move once they are made
        Thread& thread = team.emplace_back();
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, entry, 0);
    }
    for (int i = 0; i < threads; ++i) team[static_cast<std::size_t>(i)].waits = Waits::nothing;
    while (true) {
        bool ran = false;
        for (int i = 0; i < threads; ++i) {
            now = downward ? threads - 1 - i : i;
            Thread& thread = team[static_cast<std::size_t>(now)];
            if (thread.waits != Waits::nothing) continue;
            resume(thread);
            ran = true;
        }
        for (int warp = 0; warp < threads; warp += 32) release(warp, warp + 32, Waits::warp);
        if (release(0, threads, Waits::block) || ran) continue;
        if (release(0, threads, Waits::finished)) break;
        // The team is left as it is: nothing more can be run with it.
        failure = std::make_exception_ptr(
            std::logic_error("some threads wait at a barrier that the others do not come to"));
        break;
    }
    if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
}

struct HostBlock {
    template <class T>
    struct Each {
        T value;
        T& operator[](int thread) {
            if (thread != now) throw std::logic_error("a thread reads another one's variable");
            return value;
        }
    };

    int number;
    int index() const { return number; }
    void sync() const { wait(Waits::block); }

    template <class F>
    void threads(F&& f) const {
        f(now);
    }
    template <class F>
    void each(F&& f) const {
        f(now);
        wait(Waits::block);
    }

    template <class Combine>
    void butterfly(Each<float>& x, Combine combine) const {
        for (int lanes = 16; lanes > 0; lanes /= 2) {
            team[static_cast<std::size_t>(now)].lane = x.value;
            wait(Waits::warp);
            const float other = team[static_cast<std::size_t>(now ^ lanes)].lane;
            wait(Waits::warp);
            x.value = combine(x.value, other);
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
        Thread& me = team[static_cast<std::size_t>(now)];
        static_assert(sizeof me.left == sizeof a.value.x && sizeof me.right == sizeof b.value.x);
        std::memcpy(me.left, a.value.x, sizeof me.left);
        std::memcpy(me.right, b.value.x, sizeof me.right);
        wait(Waits::warp);
        const int warp = now / 32 * 32, g = now % 32 / 4, t = now % 4;
        for (int i = 0; i < Sums::rows; ++i) {
            for (int j = 0; j < Sums::columns; ++j) {
                for (int k = 0; k < 4; ++k) {
                    for (int m = 0; m < 8; ++m) {
                        const int row = g + 8 * (k / 2), column = 2 * t + k % 2;
                        const Thread& l = team[static_cast<std::size_t>(warp + row % 8 * 4 + m % 4)];
                        const Thread& r = team[static_cast<std::size_t>(warp + column * 4 + m % 4)];
                        c.value.x[i][j][k] += tf32(l.left[i][row / 8 + 2 * (m / 4)]) *
                                              tf32(r.right[j][m / 4]);
                    }
                }
            }
        }
        wait(Waits::warp);
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
    const auto bytes = static_cast<std::size_t>((shared_bytes + 15) / 16 * 16);
    auto* shared = static_cast<char*>(std::aligned_alloc(16, bytes));
    for (std::int64_t i = 0; i < blocks; ++i) {
        std::memset(shared, 0xff, bytes);
        const int number = static_cast<int>(downward ? blocks - 1 - i : i);
        kernel = [&body, number, shared] {
            HostBlock block{number};
            body(block, shared);
        };
        run_block(threads);
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

namespace {

float from_float8(std::uint8_t bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    float size = exponent != 0 ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(1.0f * mantissa, -9);
    if ((bits & 0x7f) == 0x7f) size = NAN;
    return bits & 0x80 ? -size : size;
}

}  // namespace

bool hopper_runs() { return true; }
bool ingest_runs() { return true; }

// The tensor cores have no stand-in on the host: the product is a plain one. What is the kernel's own is
// the epilogue, its tables and the order of the columns.
void linear_float8(const LinearFloat8& call, std::uintptr_t) {
    if (call.columns % (384 * call.parts) != 0) throw std::runtime_error("linear_float8: parts");
    const auto* x = static_cast<const std::uint8_t*>(call.x);
    const auto* weight = static_cast<const std::uint8_t*>(call.weight);
    for (std::int64_t row = 0; row < call.rows; ++row) {
        for (int to = 0; to < call.columns; ++to) {
            const int n = to / 32 * 32 + linear_float8_order(to % 32);
            double sum = 0;
            for (int k = 0; k < linear_float8_inner; ++k) {
                sum += static_cast<double>(from_float8(x[row * linear_float8_inner + k])) *
                       from_float8(weight[static_cast<std::int64_t>(n) * linear_float8_inner + k]);
            }
            const auto* pair = static_cast<const std::uint32_t*>(call.pairs) + n / 2 * 4;
            const auto half = [&](int i) {
                return bits_float(n % 2 ? pair[i] & 0xffff0000u : pair[i] << 16);
            };
            const float v = scaled_sum(static_cast<float>(sum), call.x_scale[row],
                                       bits_float(pair[n % 2]), half(2));
            static_cast<std::uint8_t*>(call.out)[row * call.columns + to] =
                static_cast<std::uint8_t>(float8_bits(gelu_float8(v) * half(3)));
        }
    }
}

// The same; a lane's columns are the tensor map's doing, which only a GPU has.
void linear(const Linear& call, std::uintptr_t) {
    if (call.columns % 192 != 0 || call.columns > linear_columns || call.blocks < 2) {
        throw std::runtime_error("linear: sizes");
    }
    const bool float8 = call.epilogue == linear_scaled;
    const auto value = [&](const void* matrix, std::int64_t i) {
        return float8 ? from_float8(static_cast<const std::uint8_t*>(matrix)[i])
                      : bits_float(std::uint32_t{static_cast<const std::uint16_t*>(matrix)[i]} << 16);
    };
    for (std::int64_t row = 0; row < call.rows; ++row) {
        for (int n = 0; n < call.columns; ++n) {
            double sum = 0;
            for (int k = 0; k < call.inner; ++k) {
                sum += static_cast<double>(value(call.x, row * call.inner + k)) *
                       value(call.weight, static_cast<std::int64_t>(n) * call.inner + k);
            }
            float bias = 0;
            if (call.bias != nullptr && call.bias_type == type_bfloat16) {
                bias = bits_float(std::uint32_t{static_cast<const std::uint16_t*>(call.bias)[n]} << 16);
            } else if (call.bias != nullptr) {
                bias = static_cast<const float*>(call.bias)[n];
            }
            float v = static_cast<float>(sum) + bias;
            if (call.epilogue == linear_gelu) v = gelu_bfloat16(v);
            if (float8) v = scaled_sum(static_cast<float>(sum), call.x_scale[row], call.scale[n], bias);
            static_cast<std::uint16_t*>(call.out)[row * call.columns + n] =
                static_cast<std::uint16_t>(bfloat16_bits(v));
        }
    }
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
