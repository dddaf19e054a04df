// tile_gather: tiles out of a window of an image, with border rule and normalisation.
//
//   out[n, c, t] = (clip(image[c, border(starts[n] + t)]) - offset[c]) / divisor[c]
//
// Computed in float32; from int32, uint32 and float64 pixels in float64 and rounded to float32 once. A float16 output
// is that float32 rounded to nearest even.
#pragma once

#include <cstdint>

#include "array.h"
#include "geometry.h"

namespace unet_rt {

struct TileGather {
    Array window;             // (C, Z, Y, X): image pixels [window_start, window_start + shape)
    int64_t window_start[3];  // in image pixels
    int64_t image_shape[3];   // the border rule applies at its edges
    const int64_t* starts;    // (N, 3), image pixels; may lie outside the image
    Array out;                // (N, C, Z, Y, X), float32 or float16
    Border border;
    bool affine;            // false: pixels are converted, nothing else
    double constant;        // raw pixel value of the constant border, normalised like every other; NaN: 0 in the tile
    const double* offset;   // (C,)
    const double* divisor;  // (C,)
    const double* low;      // (C,), -inf: no clip
    const double* high;     // (C,)
};

// The first tile and axis that need a pixel the window does not hold.
struct GatherGap {
    bool found = false;
    int64_t tile = 0;
    int axis = 0;
    int64_t first = 0;  // image pixels that the tile needs along the axis, inclusive
    int64_t last = 0;
};

GatherGap find_gap(const TileGather& call);

// Returns the number of NaN and infinite pixels read; a pixel counts as often as the tiles hold it.
int64_t tile_gather(const TileGather& call, int threads);

}  // namespace unet_rt
