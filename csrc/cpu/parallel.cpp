#include "parallel.h"

#include <algorithm>

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#endif

namespace normwear {

#ifdef _OPENMP

namespace {

bool forked = false;
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

int team_size(std::int64_t work, std::int64_t grain, int limit) {
    if (forked || fork_handler != 0) return 1;
    const std::int64_t useful = std::max<std::int64_t>(1, work / std::max<std::int64_t>(1, grain));
    return static_cast<int>(std::min<std::int64_t>(useful, std::max(1, limit)));
}

int team_size(std::int64_t work, std::int64_t grain) {
    return team_size(work, grain, omp_get_max_threads());
}

#else

int team_size(std::int64_t, std::int64_t) { return 1; }
int team_size(std::int64_t, std::int64_t, int) { return 1; }

#endif

}  // namespace normwear
