// crop_concat: the skip connection of a U-Net: the skip's window beside the up-sampled channels.
//
//   out[n, c, s]      = skip[n, c, offset + s]     c < C1
//   out[n, C1 + c, s] = up[n, c, s]                c < C2
#pragma once

#include <cstdint>

#include "array.h"

namespace unet_rt {

struct CropConcat {
    Array skip;         // (N, C1, Z1, Y1, X1), elements of 1, 2 or 4 bytes
    Array up;           // (N, C2, Z, Y, X), same dtype
    int64_t offset[3];  // samples of the skip
    Array out;          // (N, C1 + C2, Z, Y, X), same dtype
};

void crop_concat(const CropConcat& call, int threads);

}  // namespace unet_rt
