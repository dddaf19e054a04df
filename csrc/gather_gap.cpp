// Which pixels tiles need, for both devices: coordinates on the host are checked there.
#include <algorithm>

#include "tile_gather.h"

namespace unet_rt {

GatherGap find_gap(const TileGather& call) {
    const int64_t* held = call.window.shape + 1;
    const int64_t* tile = call.out.shape + 2;
    for (int64_t n = 0; n < call.out.shape[0]; ++n) {
        for (int axis = 0; axis < 3; ++axis) {
            const int64_t start = call.starts[3 * n + axis];
            const int64_t size = call.image_shape[axis];
            int64_t first = std::max<int64_t>(start, 0);
            int64_t last = std::min(start + tile[axis], size) - 1;
            if (first > last) first = size, last = -1;
            const auto include = [&](int64_t i) {
                const int64_t pixel = border_index(i, size, call.border);
                if (pixel < 0) return;
                first = std::min(first, pixel);
                last = std::max(last, pixel);
            };
            const int64_t stop = start + tile[axis];
            for (int64_t i = start; i < std::min<int64_t>(stop, 0); ++i) include(i);
            for (int64_t i = std::max(start, size); i < stop; ++i) include(i);
            const int64_t begin = call.window_start[axis];
            if (first <= last && (first < begin || last >= begin + held[axis])) return {true, n, axis, first, last};
        }
    }
    return {};
}

}  // namespace unet_rt
