// The CUDA kernels: the contracts of tile_gather.h, tile_stitch.h and crop_concat.h, for arrays on a device.
//
// Each function enqueues on `stream` and returns: no memory is allocated and nothing is waited for. Arrays must lie on
// the current device. A table of coordinates is read from the call (on the host: it is copied into the launches) or,
// where a DeviceTable has data, by the kernel when it runs; coordinates that nobody could check before lead nowhere
// else: a gathered pixel outside the window is the nearest that it holds, and a part that leaves its tile or the output
// is left out.
#pragma once

#include <cstdint>

#include "crop_concat.h"
#include "launch.h"
#include "tile_gather.h"
#include "tile_stitch.h"

namespace unet_rt::cuda {

// Adds the number of NaN and infinite pixels read to *non_finite, unless that is null.
void tile_gather(const TileGather& call, const DeviceTable& starts, uint64_t* non_finite, Stream stream);

void tile_stitch(const TileStitch& call, const DeviceTable& source_start, const DeviceTable& target_start,
                 const DeviceTable& size, Stream stream);

void tile_blend(const TileBlend& call, const DeviceTable& source_start, const DeviceTable& target_start,
                const DeviceTable& size, Stream stream);

// Adds the number of samples without weight to *uncovered, unless that is null.
void blend_finish(const BlendFinish& call, uint64_t* uncovered, Stream stream);

void crop_concat(const CropConcat& call, Stream stream);

}  // namespace unet_rt::cuda
