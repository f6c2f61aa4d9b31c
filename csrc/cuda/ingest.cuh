// ingest's body: one thread block a channel of a window, everything in float64 and in the order of
// operations of normwear_fast/preprocess.py, which is the definition. The file is compiled without
// contraction to fused multiply-adds: which samples the reference preprocessing drops hangs on the last
// bit of their differences.
#pragma once

#include "block.cuh"
#include "launch.h"

namespace normwear::cuda {

constexpr int ingest_threads = 256;
constexpr int smoothing_radius = 5;  // 4 sigma, sigma 1.3

// Not the same as NaN tests under fast-math, which this is never compiled with.
NORMWEAR_DEVICE bool is_finite(double x) { return x - x == 0; }
NORMWEAR_DEVICE double size_of(double x) { return x < 0 ? -x : x; }
NORMWEAR_DEVICE double not_a_number() {
#ifdef __CUDA_ARCH__
    return __longlong_as_double(0x7ff8000000000000LL);
#else
    return std::nan("");
#endif
}
NORMWEAR_DEVICE double root(double x) {
#ifdef __CUDA_ARCH__
    return sqrt(x);
#else
    return std::sqrt(x);
#endif
}
NORMWEAR_DEVICE double multiply_add(double a, double b, double c) {
#ifdef __CUDA_ARCH__
    return fma(a, b, c);
#else
    return a * b + c;
#endif
}

// A non-negative float64 as an integer of the same order.
NORMWEAR_DEVICE std::uint64_t order_key(double x) {
#ifdef __CUDA_ARCH__
    return static_cast<std::uint64_t>(__double_as_longlong(x));
#else
    std::uint64_t key;
    std::memcpy(&key, &x, 8);
    return key;
#endif
}
NORMWEAR_DEVICE double key_value(std::uint64_t key) {
#ifdef __CUDA_ARCH__
    return __longlong_as_double(static_cast<long long>(key));
#else
    double x;
    std::memcpy(&x, &key, 8);
    return x;
#endif
}

// Shared memory of a thread block; the values of a long window lie in `scratch` instead.
struct IngestShared {
    double reduce[ingest_threads];
    int before[ingest_threads], after[ingest_threads];
    int bins[256];
};

template <class Block, class Combine>
NORMWEAR_DEVICE double combine_all(Block& block, double* reduce,
                                   typename Block::template Each<double>& x, Combine combine) {
    block.each([&](int thread) { reduce[thread] = x[thread]; });
    for (int step = ingest_threads / 2; step > 0; step /= 2) {
        block.each([&](int thread) {
            if (thread < step) reduce[thread] = combine(reduce[thread], reduce[thread + step]);
        });
    }
    const double all = reduce[0];
    block.sync();
    return all;
}

struct Plus {
    NORMWEAR_DEVICE double operator()(double a, double b) const { return a + b; }
};
// NaN wins, as in NumPy.
struct Smallest {
    NORMWEAR_DEVICE double operator()(double a, double b) const { return a < b || a != a ? a : b; }
};
struct Largest {
    NORMWEAR_DEVICE double operator()(double a, double b) const { return a > b || a != a ? a : b; }
};

// combine over value(i) for i in 0 .. count - 1.
template <class Block, class Combine, class Value>
NORMWEAR_DEVICE double over(Block& block, double* reduce, int count, double start, Combine combine,
                            Value value) {
    typename Block::template Each<double> mine;
    block.threads([&](int thread) {
        double all = start;
        for (int i = thread; i < count; i += ingest_threads) all = combine(all, value(i));
        mine[thread] = all;
    });
    return combine_all(block, reduce, mine, combine);
}

NORMWEAR_DEVICE double read_raw(const Ingest& call, int channel, std::int64_t at) {
    const std::int64_t i = channel * call.channel_stride + at * call.sample_stride;
    double value;
    if (call.raw_type == type_float32) {
        value = static_cast<const float*>(call.raw)[i];
    } else {
        const std::int64_t code = call.raw_type == type_int16
                                      ? static_cast<const std::int16_t*>(call.raw)[i]
                                      : static_cast<const std::int32_t*>(call.raw)[i];
        if (code == call.invalid[channel]) return not_a_number();
        value = static_cast<double>(code);
    }
    value = value * call.gain[channel] + call.baseline[channel];
    return is_finite(value) ? value : not_a_number();
}

// Linear over missing samples, ends held. Each thread fills the gaps of its own stretch; beside the
// stretch it needs the nearest valid samples only, which nobody writes.
template <class Block>
NORMWEAR_DEVICE void fill_gaps(Block& block, double* x, int length, IngestShared& shared) {
    const int stretch = ((length + ingest_threads - 1) / ingest_threads) | 1;  // odd: other banks
    const auto end_of = [&](int thread) {
        const int end = (thread + 1) * stretch;
        return end < length ? end : length;
    };
    block.each([&](int thread) {
        int first = -1, last = -1;
        for (int i = thread * stretch; i < end_of(thread); ++i) {
            if (!is_finite(x[i])) continue;
            if (first < 0) first = i;
            last = i;
        }
        shared.after[thread] = first;
        shared.before[thread] = last;
    });
    block.each([&](int thread) {
        int before = -1;
        for (int t = thread - 1; t >= 0 && before < 0; --t) before = shared.before[t];
        int beyond = -1;
        for (int t = thread + 1; t < ingest_threads && beyond < 0; ++t) beyond = shared.after[t];
        int i = thread * stretch;
        while (i < end_of(thread)) {
            if (is_finite(x[i])) {
                before = i++;
                continue;
            }
            int next = i;
            while (next < end_of(thread) && !is_finite(x[next])) ++next;
            const int until = next;
            if (next == end_of(thread)) next = beyond;
            const int left = before < 0 ? next : before, right = next < 0 ? before : next;
            const double low = x[left], high = x[right];
            const double apart = right > left ? right - left : 1;
            for (; i < until; ++i) {
                const double weight = (i - left) / apart;
                x[i] = (1 - weight) * low + weight * high;
            }
        }
    });
}

// The threshold numpy.quantile(jumps, 0.95) of the differences between neighbours.
template <class Block>
NORMWEAR_DEVICE double jump_threshold(Block& block, const double* x, int length,
                                      IngestShared& shared) {
    const int jumps = length - 1;
    const auto key_of = [&](int i) { return order_key(size_of(x[i + 1] - x[i])); };
    const double place = (jumps - 1) * 0.95;
    const int rank = static_cast<int>(place);
    // Radix selection, a byte a pass: `left` is the rank among those that share the prefix.
    std::uint64_t prefix = 0;
    int left = rank;
    for (int shift = 56; shift >= 0; shift -= 8) {
        block.each([&](int thread) { shared.bins[thread] = 0; });
        block.each([&](int thread) {
            for (int i = thread; i < jumps; i += ingest_threads) {
                const std::uint64_t key = key_of(i);
                if (shift == 56 || (key >> (shift + 8)) == (prefix >> (shift + 8))) {
                    block.add(&shared.bins[(key >> shift) & 255]);
                }
            }
        });
        int bin = 0;
        while (bin < 255 && left >= shared.bins[bin]) left -= shared.bins[bin++];
        block.sync();
        prefix |= static_cast<std::uint64_t>(bin) << shift;
    }
    const double low = key_value(prefix);
    const double below = over(block, shared.reduce, jumps, 0.0, Plus{},
                              [&](int i) { return key_of(i) <= prefix ? 1.0 : 0.0; });
    double high = low;
    if (rank + 1 < jumps && below < rank + 2) {
        const double none = key_value(0x7ff0000000000000ull);
        high = over(block, shared.reduce, jumps, none, Smallest{},
                    [&](int i) { return key_of(i) > prefix ? key_value(key_of(i)) : none; });
    }
    const double part = place - rank, apart = high - low;
    return part >= 0.5 ? high - apart * (1 - part) : low + apart * part;
}

// preprocess(): drop jumps, interpolate, remove the trend, smooth; y then holds what is to be divided
// by the mean size, which is returned; `largest` is for the test of flatness.
template <class Block>
NORMWEAR_DEVICE double reference(Block& block, const Ingest& call, const double* x, int length,
                                 double offset, double* y, double* z, IngestShared& shared,
                                 double& largest) {
    const int outputs = call.outputs;
    const double threshold = length > 1 ? jump_threshold(block, x, length, shared) : 0;
    const auto kept = [&](int i) {
        return i == length - 1 || !(size_of(x[i + 1] - x[i]) > threshold);
    };
    block.each([&](int thread) {
        for (int j = thread; j < outputs; j += ingest_threads) {
            double position = (j / call.target_rate - offset) * call.rate;
            position = position > 0 ? position : 0;
            position = position < length - 1 ? position : length - 1;
            const int floor = static_cast<int>(position);
            int left = floor, right = floor + 1 < length ? floor + 1 : length - 1;
            while (left >= 0 && !kept(left)) --left;
            if (left < 0) {
                left = floor;
                while (!kept(left)) ++left;
            }
            while (!kept(right)) ++right;
            const double apart = right > left ? right - left : 1;
            y[j] = x[left] + (x[right] - x[left]) * ((position - left) / apart);
        }
    });
    largest = over(block, shared.reduce, outputs, 0.0, Largest{},
                   [&](int j) { return size_of(y[j]); });
    const double mean =
        over(block, shared.reduce, outputs, 0.0, Plus{}, [&](int j) { return y[j]; }) / outputs;
    const double middle = (outputs - 1) / 2.0;
    const double slope =
        over(block, shared.reduce, outputs, 0.0, Plus{},
             [&](int j) { return (y[j] - mean) * (j - middle); });
    const double squares = over(block, shared.reduce, outputs, 0.0, Plus{},
                                [&](int j) { return (j - middle) * (j - middle); });
    const double trend = slope / (squares > 0 ? squares : 1);
    block.each([&](int thread) {
        for (int j = thread; j < outputs; j += ingest_threads) {
            z[j] = (y[j] - mean) - trend * (j - middle);
        }
    });
    block.each([&](int thread) {
        for (int j = thread; j < outputs; j += ingest_threads) {
            double sum = 0;
            for (int k = -smoothing_radius; k <= smoothing_radius; ++k) {
                // Mirrored at the ends with the end samples repeated, as often as it takes.
                int i = j + k;
                while (i < 0 || i >= outputs) i = i < 0 ? -1 - i : 2 * outputs - 1 - i;
                sum += call.smoothing[k + smoothing_radius] * z[i];
            }
            y[j] = sum;
        }
    });
    return over(block, shared.reduce, outputs, 0.0, Plus{}, [&](int j) { return size_of(y[j]); }) /
           outputs;
}

// The filter: every output is a weighted sum of inputs from first[j] on.
template <class Block>
NORMWEAR_DEVICE void resample(Block& block, const Ingest& call, const double* x, int length,
                              int filter, double* y) {
    const std::int32_t* first = call.first + static_cast<std::int64_t>(filter) * call.outputs;
    const std::int32_t* phase = call.phase + static_cast<std::int64_t>(filter) * call.outputs;
    const double* weights = call.weights + static_cast<std::int64_t>(filter) * call.taps * call.phases;
    block.each([&](int thread) {
        // Beyond its ends the window goes on along the line through them, or holds them.
        const double slope = call.hold ? 0 : (x[length - 1] - x[0]) / (length > 1 ? length - 1 : 1);
        for (int j = thread; j < call.outputs; j += ingest_threads) {
            const double* weight = weights + phase[j];
            const int start = first[j];
            double sum = 0;
            if (start >= 0 && start + call.taps <= length) {
                for (int k = 0; k < call.taps; ++k) {
                    sum = multiply_add(weight[k * call.phases], x[start + k], sum);
                }
            } else {
                for (int k = 0; k < call.taps; ++k) {
                    const int i = start + k;
                    const int inside = i < 0 ? 0 : i < length ? i : length - 1;
                    const double value = i == inside ? x[i] : x[inside] + slope * (i - inside);
                    // A tap of no weight must not bring in a sample that overflowed.
                    const double w = weight[k * call.phases];
                    if (w != 0) sum = multiply_add(w, value, sum);
                }
            }
            y[j] = sum;
        }
    });
}

template <class Block>
NORMWEAR_DEVICE void ingest_body(Block& block, const Ingest& call, IngestShared& shared,
                                 double* values) {
    const int window = block.index() / call.channels, channel = block.index() % call.channels;
    const int length = call.lengths[window], outputs = call.outputs;
    const std::int64_t start = call.starts[window];
    if (call.scratch != nullptr) {
        values = call.scratch + block.index() * ingest_values(call.longest, outputs);
    }
    double* x = values;
    double* y = values + call.longest;
    double* z = y + outputs;
    const std::int64_t at = block.index();
    float* out = call.out + at * outputs;
    // Rounding errors only, below this part of the largest value: ROUNDING of preprocess.py.
    const double rounding = 64 * 2.220446049250313e-16;

    const double missing = [&] {
        typename Block::template Each<double> mine;
        block.threads([&](int thread) {
            double count = 0;
            for (int i = thread; i < length; i += ingest_threads) {
                const std::int64_t sample = start + i;
                const bool inside = sample >= 0 && sample < call.samples;
                x[i] = inside ? read_raw(call, channel, sample) : not_a_number();
                count += is_finite(x[i]) ? 0 : 1;
            }
            mine[thread] = count;
        });
        return combine_all(block, shared.reduce, mine, Plus{});
    }();
    if (missing == length) {
        block.threads([&](int thread) {
            for (int j = thread; j < outputs; j += ingest_threads) {
                out[j] = static_cast<float>(not_a_number());
            }
            if (thread == 0) {
                call.missing[at] = length;
                call.flags[at] = flag_empty;
            }
        });
        return;
    }
    if (missing > 0) fill_gaps(block, x, length, shared);
    const double lowest =
        over(block, shared.reduce, length, x[0], Smallest{}, [&](int i) { return x[i]; });
    const double highest =
        over(block, shared.reduce, length, x[0], Largest{}, [&](int i) { return x[i]; });
    bool flat = lowest == highest;

    // What y is divided by in the end, and what is subtracted before.
    double mean = 0, scale = 1;
    if (call.reference) {
        double largest;
        scale = reference(block, call, x, length, call.offsets[window], y, z, shared, largest);
        const bool still = scale <= rounding * largest;
        flat = flat || still;
        block.each([&](int thread) {
            for (int j = thread; j < outputs; j += ingest_threads) {
                y[j] = still ? 0 : y[j] / scale;
            }
        });
        scale = 1;
    } else {
        resample(block, call, x, length, call.filters[window], y);
    }
    bool constant = false;
    if (call.normalize == 1) {
        mean = over(block, shared.reduce, outputs, 0.0, Plus{}, [&](int j) { return y[j]; }) / outputs;
        const double squares = over(block, shared.reduce, outputs, 0.0, Plus{}, [&](int j) {
            return (y[j] - mean) * (y[j] - mean);
        });
        scale = root(squares / outputs);
        constant = flat || scale <= rounding * size_of(mean);
    } else if (call.normalize == 2) {
        mean = call.statistics[2 * channel];
        scale = call.statistics[2 * channel + 1];
        constant = scale <= rounding * size_of(mean);
    }
    if (!is_finite(scale)) scale = not_a_number();  // infinite, it would turn y into zeros
    const double beyond = over(block, shared.reduce, outputs, 0.0, Plus{}, [&](int j) {
        const double value = constant ? 0 : (y[j] - mean) / scale;
        out[j] = static_cast<float>(value);
        return size_of(value) <= 3.4028234663852886e38 ? 0.0 : 1.0;
    });
    block.threads([&](int thread) {
        if (thread != 0) return;
        call.missing[at] = static_cast<std::int32_t>(missing);
        call.flags[at] = (flat || constant ? flag_flat : 0) | (beyond > 0 ? flag_too_large : 0);
    });
}

}  // namespace normwear::cuda
