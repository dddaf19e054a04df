// crop_concat for contiguous NCHW arrays, as a kernel that an inference library embeds: compiled to PTX
// (crop_concat.ptx beside the package's modules) and launched by whoever loads it, without this project's runtime.
//
//   unet_rt_crop_concat_f32 and unet_rt_crop_concat_f16, with the arguments
//     const T* skip  (n, c1, h1, w1)
//     const T* up    (n, c2, h, w)        h <= h1, w <= w1; the window of skip is centred
//     int32 n, c1, h1, w1, c2, h, w
//     T* out         (n, c1 + c2, h, w)
//
// Any one-dimensional grid gives the result, since threads go on to the next vector in steps of the grid. To give every
// thread one vector of 16 bytes: blocks = ceil(n * (c1 + c2) * h * ceil((w + v - 1) / v) / 256), threads = 256, where v
// is 4 for float32 and 8 for float16.
#include "launch.h"

namespace unet_rt::cuda {
namespace {

template <class T>
__device__ __forceinline__ void concat(const char* skip, const char* up, int32_t n, int32_t c1, int32_t h1, int32_t w1,
                                       int32_t c2, int32_t h, int32_t w, char* out) {
    constexpr int32_t kVector = 16 / sizeof(T);
    const int64_t vectors = (w + 2 * kVector - 2) / kVector;  // per row, wherever its first sample lies
    const int64_t items = static_cast<int64_t>(n) * (c1 + c2) * h * vectors;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    const auto top = centre_offset(h1, h), left = centre_offset(w1, w);
    for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < items; item += step) {
        const int64_t line =
            items <= UINT32_MAX ? static_cast<uint32_t>(item) / static_cast<uint32_t>(vectors) : item / vectors;
        const auto vector = static_cast<int32_t>(item - line * vectors);
        const int64_t plane = line <= UINT32_MAX ? static_cast<uint32_t>(line) / static_cast<uint32_t>(h) : line / h;
        const auto y = static_cast<int32_t>(line - plane * h);
        const auto image = static_cast<int32_t>(plane / (c1 + c2));
        const auto c = static_cast<int32_t>(plane - static_cast<int64_t>(image) * (c1 + c2));
        const char* const from =
            c < c1 ? skip + (((static_cast<int64_t>(image) * c1 + c) * h1 + top + y) * w1 + left) *
                                static_cast<int64_t>(sizeof(T))
                   : up + ((static_cast<int64_t>(image) * c2 + c - c1) * h + y) * w * static_cast<int64_t>(sizeof(T));
        char* const to = out + line * w * static_cast<int64_t>(sizeof(T));
        const int32_t lead = static_cast<int32_t>(address_of(to) / sizeof(T)) & (kVector - 1);
        const int32_t x = vector * kVector - lead;
        if (x >= 0 && x + kVector <= w) {
            T samples[kVector];
            load_many(from + x * static_cast<int64_t>(sizeof(T)), sizeof(T), samples);
            store_aligned<16>(to + x * static_cast<int64_t>(sizeof(T)), samples);
        } else {
            for (int32_t i = max(x, 0); i < min(x + kVector, w); ++i)
                store_one(to + i * static_cast<int64_t>(sizeof(T)),
                          load_one<T>(from + i * static_cast<int64_t>(sizeof(T))));
        }
    }
}

}  // namespace
}  // namespace unet_rt::cuda

extern "C" __global__ void unet_rt_crop_concat_f32(const char* skip, const char* up, int32_t n, int32_t c1, int32_t h1,
                                                   int32_t w1, int32_t c2, int32_t h, int32_t w, char* out) {
    unet_rt::cuda::concat<uint32_t>(skip, up, n, c1, h1, w1, c2, h, w, out);
}

extern "C" __global__ void unet_rt_crop_concat_f16(const char* skip, const char* up, int32_t n, int32_t c1, int32_t h1,
                                                   int32_t w1, int32_t c2, int32_t h, int32_t w, char* out) {
    unet_rt::cuda::concat<uint16_t>(skip, up, n, c1, h1, w1, c2, h, w, out);
}
