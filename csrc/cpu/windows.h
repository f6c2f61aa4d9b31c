// Cutting windows from a channel, and filling what is missing in them.
#pragma once

#include <cstdint>

namespace normwear {

// Copies windows out of one channel.
//
//   block    n samples, `stride` elements apart
//   starts   (count): index of each window's first sample; may be negative or past the end
//   windows  (count, length), rows contiguous; samples outside the block become NaN
//   missing  (count): how many samples of each window are NaN or infinite, before any filling
//   fill     also fill the missing samples, as fill_missing does
void gather_windows(const double* block, std::int64_t n, std::int64_t stride,
                    const std::int64_t* starts, std::int64_t count, std::int64_t length,
                    double* windows, std::int64_t* missing, bool fill);

// Fills the NaN and infinite samples of each row of `windows` (count, length; rows `stride`
// elements apart) in place: linear between the nearest valid samples, the first and last valid
// values held to the ends. A row with no valid sample becomes NaN throughout. `missing` as above.
void fill_missing(double* windows, std::int64_t count, std::int64_t length, std::int64_t stride,
                  std::int64_t* missing);

}  // namespace normwear
