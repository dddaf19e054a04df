// histogram: how often each value of an 8-bit or 16-bit integer occurs.
//
//   counts[v] += number of i < size with values[i] == v
//
// The normalisation of an image rests on it (exact percentiles, mean and deviation), and it is what a prediction has to
// wait for before its first tile.
#pragma once

#include <cstdint>

namespace unet_rt {

struct Histogram {
    const void* values;  // contiguous, unsigned
    int64_t size;
    int bytes;        // of a value: 1 or 2
    int64_t* counts;  // (256,) or (65536,)
};

void histogram(const Histogram& call, int threads);

}  // namespace unet_rt
