// Jobs of an operator on a team of threads: the only parallel regions of the kernels.
#pragma once

#include "kernels.h"

namespace normwear {
namespace NORMWEAR_ISA {
namespace {

// job(0) .. job(count - 1), each taken by the next thread that is free.
template <typename Job>
void in_turn(int64_t count, int threads, const Job& job) {
    Failure failure;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Arithmetic plain;
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < count; ++i) {
            try {
                job(i);
            } catch (...) {
                failure.note();
            }
        }
        trim_scratch();
    }
    failure.raise();
}

// The same for jobs of one size: as many successive ones for every thread.
template <typename Job>
void evenly(int64_t count, int threads, const Job& job) {
    Failure failure;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Arithmetic plain;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < count; ++i) {
            try {
                job(i);
            } catch (...) {
                failure.note();
            }
        }
        trim_scratch();
    }
    failure.raise();
}

}  // namespace
}  // namespace NORMWEAR_ISA
}  // namespace normwear
