#include "windows.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "parallel.h"

namespace normwear {

namespace {

constexpr double nan = std::numeric_limits<double>::quiet_NaN();

// Samples a thread should have before a second one helps: some 20 us of copying.
constexpr std::int64_t grain = 1 << 15;

std::int64_t count_missing(const double* row, std::int64_t length) {
    std::int64_t missing = 0;
    for (std::int64_t i = 0; i < length; ++i) missing += !std::isfinite(row[i]);
    return missing;
}

void fill_row(double* row, std::int64_t length) {
    std::int64_t valid = 0;
    while (valid < length && !std::isfinite(row[valid])) ++valid;
    if (valid == length) {
        std::fill(row, row + length, nan);
        return;
    }
    std::fill(row, row + valid, row[valid]);
    for (std::int64_t i = valid + 1; i < length; ++i) {
        if (!std::isfinite(row[i])) continue;
        if (i - valid > 1) {
            const double slope = (row[i] - row[valid]) / static_cast<double>(i - valid);
            for (std::int64_t k = valid + 1; k < i; ++k) {
                row[k] = slope * static_cast<double>(k - valid) + row[valid];
            }
        }
        valid = i;
    }
    std::fill(row + valid + 1, row + length, row[valid]);
}

void gather_row(const double* block, std::int64_t n, std::int64_t stride, std::int64_t start,
                std::int64_t length, double* row) {
    // Compared so that no sum can overflow, whatever `start` is.
    if (start >= n || start <= -length) {
        std::fill(row, row + length, nan);
        return;
    }
    const std::int64_t before = start < 0 ? -start : 0;
    const std::int64_t end = std::min(length, n - start);
    std::fill(row, row + before, nan);
    const double* from = block + (start + before) * stride;
    if (stride == 1) {
        std::copy(from, from + (end - before), row + before);
    } else {
        for (std::int64_t i = before; i < end; ++i, from += stride) row[i] = *from;
    }
    std::fill(row + end, row + length, nan);
}

}  // namespace

void gather_windows(const double* block, std::int64_t n, std::int64_t stride,
                    const std::int64_t* starts, std::int64_t count, std::int64_t length,
                    double* windows, std::int64_t* missing, bool fill) {
    [[maybe_unused]] const int team = team_size(count * length, grain);
#pragma omp parallel for schedule(static) num_threads(team)
    for (std::int64_t w = 0; w < count; ++w) {
        double* row = windows + w * length;
        gather_row(block, n, stride, starts[w], length, row);
        missing[w] = count_missing(row, length);
        if (fill && missing[w] > 0) fill_row(row, length);
    }
}

void fill_missing(double* windows, std::int64_t count, std::int64_t length, std::int64_t stride,
                  std::int64_t* missing) {
    [[maybe_unused]] const int team = team_size(count * length, grain);
#pragma omp parallel for schedule(static) num_threads(team)
    for (std::int64_t w = 0; w < count; ++w) {
        double* row = windows + w * stride;
        missing[w] = count_missing(row, length);
        if (missing[w] > 0) fill_row(row, length);
    }
}

}  // namespace normwear
