// The kernels' threads in a program of their own, for ThreadSanitizer: several calls at once, each with several
// threads, and the results of one thread as the truth. Exit code 0: they agree.
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "crop_concat.h"
#include "histogram.h"
#include "tile_gather.h"
#include "tile_stitch.h"

namespace {

using namespace unet_rt;

constexpr int64_t kSide = 1200, kTile = 512;

template <class T>
Array view(std::vector<T>& values, DType dtype, std::initializer_list<int64_t> shape) {
    Array array{};
    array.data = reinterpret_cast<char*>(values.data());
    array.dtype = dtype;
    int axis = kMaxAxes;
    int64_t stride = sizeof(T);
    for (auto n = shape.end(); n != shape.begin();) {
        array.shape[--axis] = *--n;
        array.stride[axis] = stride;
        stride *= *n;
    }
    while (axis-- > 0) array.stride[axis] = stride;
    return array;
}

// Views of fewer axes than kernels take have their axes first.
Array front(Array array, int axes) {
    Array moved{};
    moved.data = array.data;
    moved.dtype = array.dtype;
    for (int k = 0; k < axes; ++k) {
        moved.shape[k] = array.shape[kMaxAxes - axes + k];
        moved.stride[k] = array.stride[kMaxAxes - axes + k];
    }
    return moved;
}

struct Results {
    std::vector<float> tiles, whole, joined;
    std::vector<int64_t> counts;
    int64_t bad = 0;
    bool operator==(const Results& other) const {
        return tiles == other.tiles && whole == other.whole && joined == other.joined && counts == other.counts &&
               bad == other.bad;
    }
};

Results run(std::vector<uint16_t>& image, int threads) {
    Results results;
    results.counts.assign(65536, 0);
    // At an odd address, as in a mapped file.
    std::vector<char> bytes(image.size() * 2 + 1);
    std::memcpy(bytes.data() + 1, image.data(), image.size() * 2);
    histogram({bytes.data() + 1, static_cast<int64_t>(image.size()), 2, results.counts.data()}, threads);

    const int64_t starts[] = {0, 0, 0, 0, 0, kSide - kTile, 0, kSide - kTile, 0, 0, kSide - kTile, kSide - kTile};
    const double zero[] = {0.0}, one[] = {3.0}, low[] = {-1e9}, high[] = {1e9};
    results.tiles.assign(4 * kTile * kTile, 0.0f);
    TileGather gather{};
    gather.window = front(view(image, DType::u16, {1, 1, kSide, kSide}), 4);
    gather.image_shape[0] = 1;
    gather.image_shape[1] = gather.image_shape[2] = kSide;
    gather.starts = starts;
    gather.out = view(results.tiles, DType::f32, {4, 1, 1, kTile, kTile});
    gather.border = Border::mirror;
    gather.affine = true;
    gather.offset = zero;
    gather.divisor = one;
    gather.low = low;
    gather.high = high;
    results.bad = tile_gather(gather, threads);

    const int64_t source[12] = {}, size[] = {1, kTile, kTile, 1, kTile, kTile, 1, kTile, kTile, 1, kTile, kTile};
    results.whole.assign(kSide * kSide, 0.0f);
    TileStitch stitch{};
    stitch.tiles = gather.out;
    stitch.source_start = source;
    stitch.target_start = starts;
    stitch.size = size;
    stitch.out = front(view(results.whole, DType::f32, {1, 1, kSide, kSide}), 4);
    stitch.op = Op::sigmoid;
    tile_stitch(stitch, threads);

    results.joined.assign(4 * 2 * kTile * kTile, 0.0f);
    CropConcat concat{};
    concat.skip = concat.up = gather.out;
    concat.out = view(results.joined, DType::f32, {4, 2, 1, kTile, kTile});
    crop_concat(concat, threads);
    return results;
}

}  // namespace

int main() {
    std::vector<uint16_t> image(kSide * kSide);
    for (size_t i = 0; i < image.size(); ++i) image[i] = static_cast<uint16_t>(i * 2654435761u >> 16);
    const Results truth = run(image, 1);
    Results found[3];
    std::thread callers[3];
    for (int k = 0; k < 3; ++k) callers[k] = std::thread([&, k] { found[k] = run(image, 2 + 2 * k); });
    for (auto& caller : callers) caller.join();
    for (const auto& one : found)
        if (!(one == truth)) {
            std::puts("threads change the result");
            return 1;
        }
    std::puts("the same from 1 to 6 threads, 3 calls at once");
    return 0;
}
