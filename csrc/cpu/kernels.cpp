// Which table of kernels a processor can run, their scratch memory and their threads.

#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#ifdef NORMWEAR_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "parallel.h"

namespace normwear {

namespace portable { const Kernels& table(); }
#ifdef NORMWEAR_X86  // set by setup.py where the compiler takes the flags of kernels_avx*.cpp
namespace avx2 { const Kernels& table(); }
namespace avx512 { const Kernels& table(); }
namespace avx512bf16 { const Kernels& table(); }
#ifdef NORMWEAR_AMX  // set where it takes those of kernels_amx.cpp too
namespace amx { const Kernels& table(); }
#endif
#endif

#ifdef NORMWEAR_AMX

namespace {

// Whether the processor has the tile unit with bfloat16 and int8, and the system lets this process use it: Linux
// wants to be asked, for its signal frames grow by 8 KB.
bool tiles_allowed() {
#ifdef NORMWEAR_EMULATE_TILES
    return true;
#elif defined(__linux__)
    unsigned a, b, c, d;
    constexpr unsigned bfloat16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25, all = bfloat16 | tile | int8;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & all) != all) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

}  // namespace

#endif

const Kernels* kernels(const char* name) {
#ifdef NORMWEAR_X86
    __builtin_cpu_init();
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool vnni = fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
    const bool bfloat16 = vnni && __builtin_cpu_supports("avx512bf16");
#ifdef NORMWEAR_AMX
    static const bool tiles = bfloat16 && tiles_allowed();
    if (std::strcmp(name, "amx") == 0) return tiles ? &amx::table() : nullptr;
#endif
    if (std::strcmp(name, "avx512bf16") == 0) return bfloat16 ? &avx512bf16::table() : nullptr;
    if (std::strcmp(name, "avx512") == 0) return vnni ? &avx512::table() : nullptr;
    if (std::strcmp(name, "avx2") == 0) return fma ? &avx2::table() : nullptr;
#endif
    return std::strcmp(name, "portable") == 0 ? &portable::table() : nullptr;
}

namespace {

// Grows and stays, but for what is huge; freed with its thread.
struct Scratch {
    void* data[16] = {};
    std::int64_t bytes[16] = {};
    bool huge = false;

    ~Scratch() {
        for (void* p : data) std::free(p);
    }
};

thread_local Scratch mine;

constexpr std::int64_t kept = 64 << 20;  // of a slot

}  // namespace

void* scratch(int slot, std::int64_t bytes) {
    if (mine.bytes[slot] < bytes) {
        std::free(mine.data[slot]);
        mine.data[slot] = nullptr;
        mine.bytes[slot] = 0;
        // A packed block, read again for every 32 outputs, lies on huge pages: 5 to 10 % of a layer on the tile unit.
        const std::size_t alignment = bytes >= (256 << 10) ? 2 << 20 : 64;
        const std::size_t rounded = (static_cast<std::size_t>(bytes) + alignment - 1) / alignment * alignment;
        mine.data[slot] = std::aligned_alloc(alignment, rounded);
        if (!mine.data[slot]) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        if (alignment > 64) madvise(mine.data[slot], rounded, MADV_HUGEPAGE);
#endif
        mine.bytes[slot] = static_cast<std::int64_t>(rounded);
        mine.huge = mine.huge || mine.bytes[slot] > kept;
    }
    return mine.data[slot];
}

void trim_scratch() noexcept {
    if (!mine.huge) return;
    for (int slot = 0; slot < 16; ++slot) {
        if (mine.bytes[slot] <= kept) continue;
        std::free(mine.data[slot]);
        mine.data[slot] = nullptr;
        mine.bytes[slot] = 0;
    }
    mine.huge = false;
}

#if defined(__SSE__)
Arithmetic::Arithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
Arithmetic::~Arithmetic() { _mm_setcsr(before_); }
#else
Arithmetic::Arithmetic() {
    fegetenv(&before_);
    fesetenv(FE_DFL_ENV);
}
Arithmetic::~Arithmetic() { fesetenv(&before_); }
#endif

void Failure::raise() const {
    if (happened_) throw std::bad_alloc();
}

int cpu_team(int threads, std::int64_t work, std::int64_t grain) {
    return team_size(work, grain, threads);
}

}  // namespace normwear
