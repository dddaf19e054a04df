// tile_stitch: parts of tiles to their places in an output; blend_finish: the same for an accumulated total.
//
//   tile_stitch   out[.., target_start[n] + j] = op(tiles[n, :, source_start[n] + j])           0 <= j < size[n]
//   tile_blend    total[k, target + j] += weight[source + j] * tiles[n, k, source + j]          n = 0, 1, ... in order
//                 weight_total[target + j] += weight[source + j]
//   blend_finish  out = op(total / weight_total)
//
// Values are float32 throughout (float16 tiles are widened first). softmax subtracts the largest channel and sums in
// channel order; a NaN in any channel makes all channels of that sample NaN. argmax takes the first maximum, and the
// first NaN over everything. A threshold is met by values above it, so NaN does not meet it.
#pragma once

#include <cstdint>

#include "array.h"
#include "geometry.h"

namespace unet_rt {

enum class Op : int { copy, softmax, sigmoid, argmax, threshold };

struct TileStitch {
    Array tiles;                  // (N, K, Z, Y, X), float32 or float16
    const int64_t* source_start;  // (N, 3), samples of the tile
    const int64_t* target_start;  // (N, 3), samples of the output; targets do not overlap
    const int64_t* size;          // (N, 3), samples
    Array out;                    // (K or 1, Z, Y, X): float32, or uint8 for argmax (1) and threshold (K)
    Op op;
    const float* threshold;  // (K,)
    const uint8_t* values;   // (K,) value of each class for argmax; (2,) value below and above for threshold
};

void tile_stitch(const TileStitch& call, int threads);

struct TileBlend {
    Array tiles;                  // (N, K, Z, Y, X), float32 or float16
    const int64_t* source_start;  // (N, 3)
    const int64_t* target_start;  // (N, 3); targets may overlap
    const int64_t* size;          // (N, 3)
    Array weight;                 // (Z, Y, X) of the tile, float32
    Array total;                  // (K, Z, Y, X), float32
    Array weight_total;           // (Z, Y, X), float32
};

void tile_blend(const TileBlend& call, int threads);

struct BlendFinish {
    Array total;         // (K, Z, Y, X), float32
    Array weight_total;  // (Z, Y, X), float32
    Array out;           // as in TileStitch
    Op op;
    const float* threshold;
    const uint8_t* values;
};

// Returns the number of samples without weight; they become NaN, the first class, or the value below the threshold.
int64_t blend_finish(const BlendFinish& call, int threads);

}  // namespace unet_rt
