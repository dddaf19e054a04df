// CPU kernel: copies rows, or whole planes where rows follow each other in both arrays.
#include "crop_concat.h"

#include <cstring>

#include "parallel.h"

namespace unet_rt {
namespace {

template <int kBytes>
void copy_row(const char* from, int64_t from_stride, char* to, int64_t to_stride, int64_t count) {
    if (from_stride == kBytes && to_stride == kBytes) {
        memcpy(to, from, static_cast<size_t>(count * kBytes));
        return;
    }
    for (int64_t i = 0; i < count; ++i) memcpy(to + i * to_stride, from + i * from_stride, kBytes);
}

using CopyRow = void (*)(const char*, int64_t, char*, int64_t, int64_t);

CopyRow choose(int64_t bytes) {
    if (bytes == 1) return copy_row<1>;
    return bytes == 2 ? copy_row<2> : copy_row<4>;
}

}  // namespace

void crop_concat(const CropConcat& call, int threads) {
    const Array& o = call.out;
    const int64_t bytes = item_bytes(o.dtype);
    const CopyRow copy = choose(bytes);
    const int64_t skip_channels = call.skip.shape[1];
    const int64_t planes = o.shape[0] * o.shape[1] * o.shape[2];
    const int64_t height = o.shape[3];
    const int64_t width = o.shape[4];
    const int workers = worker_count(planes * height * width, threads);
    parallel_for(planes * height, workers, [&](int, int64_t begin, int64_t end) {
        while (begin < end) {
            const int64_t y = begin % height;
            const int64_t plane = begin / height;
            const int64_t z = plane % o.shape[2];
            const int64_t c = plane / o.shape[2] % o.shape[1];
            const int64_t n = plane / o.shape[2] / o.shape[1];
            const bool skip = c < skip_channels;
            const Array& from = skip ? call.skip : call.up;
            const int64_t dz = skip ? call.offset[0] : 0;
            const int64_t dy = skip ? call.offset[1] : 0;
            const int64_t dx = skip ? call.offset[2] : 0;
            const char* const source = from.data + n * from.stride[0] +
                                       (skip ? c : c - skip_channels) * from.stride[1] + (z + dz) * from.stride[2] +
                                       (y + dy) * from.stride[3] + dx * from.stride[4];
            char* const target = o.data + n * o.stride[0] + c * o.stride[1] + z * o.stride[2] + y * o.stride[3];
            const bool adjacent = from.stride[4] == bytes && o.stride[4] == bytes && from.stride[3] == bytes * width &&
                                  o.stride[3] == bytes * width;
            const int64_t rows = adjacent ? std::min(height - y, end - begin) : 1;
            copy(source, from.stride[4], target, o.stride[4], rows * width);
            begin += rows;
        }
    });
}

}  // namespace unet_rt
