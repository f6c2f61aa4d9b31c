// How attention is shared out, whatever multiplies.
#pragma once

#include "vectors.h"

namespace normwear {
namespace NORMWEAR_ISA {
namespace {

// A job: a head of a segment, or a share of its queries.
struct Share {
    int64_t head;
    int64_t query, query_stop, key, keys;  // rows of the arguments
};

// Jobs a head. Fewer heads than would keep the threads busy are cut by queries, and their keys packed again.
inline int64_t shares_of_head(const AttentionArguments& p, int threads) {
    const int64_t heads = most(1, p.segments * p.heads);
    return heads >= 2 * threads ? 1 : ceil_div(2 * threads, heads);
}

// Queries are cut where `at_once` of them end; a share may have none.
inline Share share_of(const AttentionArguments& p, int64_t job, int64_t parts, int64_t at_once) {
    const int64_t segment = job / (p.heads * parts), head = job / parts % p.heads, part = job % parts;
    const int64_t first = p.queries[segment], all = p.queries[segment + 1] - first, blocks = ceil_div(all, at_once);
    return {head, first + blocks * part / parts * at_once, first + least(all, blocks * (part + 1) / parts * at_once),
            p.keys[segment], p.keys[segment + 1] - p.keys[segment]};
}

}  // namespace
}  // namespace NORMWEAR_ISA
}  // namespace normwear
