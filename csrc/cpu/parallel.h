// How many OpenMP threads an operator may use.
#pragma once

#include <cstdint>

namespace normwear {

// The team for `work` elementary steps: 1 below `grain` steps a thread, where waking threads costs
// more than it saves, and 1 in a forked child, where GNU OpenMP would wait for threads that only
// the parent has. Never more than OpenMP's own maximum (OMP_NUM_THREADS), or than `limit` where the
// caller knows better (torch has its own OpenMP and its own set_num_threads).
int team_size(std::int64_t work, std::int64_t grain);
int team_size(std::int64_t work, std::int64_t grain, int limit);

}  // namespace normwear
