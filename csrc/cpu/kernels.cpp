// Which table of kernels a processor can run, their scratch memory and their threads.

#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "parallel.h"

namespace normwear {

namespace portable { const Kernels& table(); }
#ifdef NORMWEAR_X86  // set by setup.py where the compiler takes the flags of kernels_avx*.cpp
namespace avx2 { const Kernels& table(); }
namespace avx512 { const Kernels& table(); }
namespace avx512bf16 { const Kernels& table(); }
#endif

const Kernels* kernels(const char* name) {
#ifdef NORMWEAR_X86
    __builtin_cpu_init();
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool vnni = fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
    if (std::strcmp(name, "avx512bf16") == 0) {
        return vnni && __builtin_cpu_supports("avx512bf16") ? &avx512bf16::table() : nullptr;
    }
    if (std::strcmp(name, "avx512") == 0) return vnni ? &avx512::table() : nullptr;
    if (std::strcmp(name, "avx2") == 0) return fma ? &avx2::table() : nullptr;
#endif
    return std::strcmp(name, "portable") == 0 ? &portable::table() : nullptr;
}

namespace {

// Grows and stays; freed with its thread.
struct Scratch {
    void* data[16] = {};
    std::int64_t bytes[16] = {};

    ~Scratch() {
        for (void* p : data) std::free(p);
    }
};

thread_local Scratch mine;

}  // namespace

void* scratch(int slot, std::int64_t bytes) {
    if (mine.bytes[slot] < bytes) {
        std::free(mine.data[slot]);
        mine.bytes[slot] = 0;
        const std::size_t rounded = (static_cast<std::size_t>(bytes) + 63) / 64 * 64;
        mine.data[slot] = std::aligned_alloc(64, rounded);
        if (!mine.data[slot]) throw std::bad_alloc();
        mine.bytes[slot] = bytes;
    }
    return mine.data[slot];
}

int cpu_team(int threads, std::int64_t work, std::int64_t grain) {
    return team_size(work, grain, threads);
}

}  // namespace normwear
