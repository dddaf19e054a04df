// CPU kernel. Work is cut into bands of rows of one tile and channel. A row is [left border | image | right border]:
// the image part is converted straight from the window where its pixels are adjacent, everything else goes through a
// small buffer of raw pixels, so that one vectorised function per pixel type does all arithmetic.
#include "tile_gather.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "half.h"
#include "parallel.h"
#include "pixel.h"
#include "simd.h"

namespace unet_rt {
namespace gather {

constexpr int64_t kBandRows = 32;
// Pixels per step through the buffer: 8 kB of the widest pixel type stay in the first-level cache.
constexpr int64_t kBlock = 1024;
// Where neighbours along a row are further apart than a cache line (a transposed image), a band is walked in blocks of
// columns, so that lines fetched for its first row are still there for the others.
constexpr int64_t kCacheLine = 64;
constexpr int64_t kColumnBlock = 128;

struct Affine {
    double low, high, offset, divisor;
};

// `count` adjacent pixels (of any alignment) to values; returns the number of non-finite ones.
template <class T, bool kAffine>
UNET_RT_SIMD int64_t convert_row(const char* pixels, int64_t count, const Affine& affine, float* values) {
    using Compute = typename Pixel<T>::Compute;
    const auto low = static_cast<Compute>(affine.low);
    const auto high = static_cast<Compute>(affine.high);
    const auto offset = static_cast<Compute>(affine.offset);
    const auto divisor = static_cast<Compute>(affine.divisor);
    decltype(Pixel<T>::non_finite(T{})) bad = 0;
    for (int64_t i = 0; i < count; ++i) {
        T pixel;
        memcpy(&pixel, pixels + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
        Compute value = Pixel<T>::value(pixel);
        if (kAffine) value = normalised(value, low, high, offset, divisor);
        values[i] = static_cast<float>(value);
        bad += Pixel<T>::non_finite(pixel);
    }
    return static_cast<int64_t>(bad);
}

using ConvertRow = int64_t (*)(const char*, int64_t, const Affine&, float*);

template <class T>
ConvertRow choose_for(bool affine) {
    return affine ? convert_row<T, true> : convert_row<T, false>;
}

// float16 pixels are widened before, which keeps their value and whether they are finite.
ConvertRow choose(DType pixel, bool affine) {
    switch (pixel) {
        case DType::u8:
            return choose_for<uint8_t>(affine);
        case DType::i8:
            return choose_for<int8_t>(affine);
        case DType::u16:
            return choose_for<uint16_t>(affine);
        case DType::i16:
            return choose_for<int16_t>(affine);
        case DType::u32:
            return choose_for<uint32_t>(affine);
        case DType::i32:
            return choose_for<int32_t>(affine);
        case DType::f64:
            return choose_for<double>(affine);
        default:
            return choose_for<float>(affine);
    }
}

// Pixels that are not adjacent, into the buffer. Channels-last images have strides of 2, 3 or 4 pixels; with the factor
// known the compiler turns the loop into vector shuffles.
template <int kBytes, int kStep>
UNET_RT_SIMD void pack_step(const char* pixels, int64_t stride, int64_t count, char* buffer) {
    for (int64_t i = 0; i < count; ++i)
        memcpy(buffer + i * kBytes, pixels + i * (kStep ? kStep * kBytes : stride), kBytes);
}

template <int kBytes>
void pack(const char* pixels, int64_t stride, int64_t count, char* buffer) {
    if (stride == 2 * kBytes) return pack_step<kBytes, 2>(pixels, stride, count, buffer);
    if (stride == 3 * kBytes) return pack_step<kBytes, 3>(pixels, stride, count, buffer);
    if (stride == 4 * kBytes) return pack_step<kBytes, 4>(pixels, stride, count, buffer);
    if (stride == -kBytes) return pack_step<kBytes, -1>(pixels, stride, count, buffer);
    return pack_step<kBytes, 0>(pixels, stride, count, buffer);
}

template <int kBytes>
void pack_table(const char* pixels, const int64_t* offsets, int64_t count, char* buffer) {
    for (int64_t i = 0; i < count; ++i) memcpy(buffer + i * kBytes, pixels + offsets[i], kBytes);
}

void pack_any(int64_t bytes, const char* pixels, int64_t stride, int64_t count, char* buffer) {
    if (bytes == 1) return pack<1>(pixels, stride, count, buffer);
    if (bytes == 2) return pack<2>(pixels, stride, count, buffer);
    if (bytes == 4) return pack<4>(pixels, stride, count, buffer);
    return pack<8>(pixels, stride, count, buffer);
}

void pack_table_any(int64_t bytes, const char* pixels, const int64_t* offsets, int64_t count, char* buffer) {
    if (bytes == 1) return pack_table<1>(pixels, offsets, count, buffer);
    if (bytes == 2) return pack_table<2>(pixels, offsets, count, buffer);
    if (bytes == 4) return pack_table<4>(pixels, offsets, count, buffer);
    return pack_table<8>(pixels, offsets, count, buffer);
}

// One call's constants and the state of one worker.
class Gatherer {
  public:
    Gatherer(const TileGather& call, int64_t* columns)
        : call_(call),
          convert_(choose(call.window.dtype, call.affine)),
          pixel_bytes_(item_bytes(call.window.dtype)),
          value_bytes_(item_bytes(call.out.dtype)),
          columns_(columns) {}

    // Rows [row, row_end) of plane z of channel c of tile n.
    int64_t band(int64_t n, int64_t c, int64_t z, int64_t row, int64_t row_end) {
        if (n != tile_) enter_tile(n);
        const Array& w = call_.window;
        const Array& o = call_.out;
        const Affine affine{call_.low[c], call_.high[c], call_.offset[c], call_.divisor[c]};
        const int64_t width = o.shape[4];
        const int64_t plane = border_index(call_.starts[3 * n] + z, call_.image_shape[0], call_.border);
        const char* const source = w.data + c * w.stride[0] + (plane - call_.window_start[0]) * w.stride[1];
        char* const target = o.data + n * o.stride[0] + c * o.stride[1] + z * o.stride[2];
        const bool scattered = std::abs(w.stride[3]) > kCacheLine;
        const int64_t block = scattered ? kColumnBlock : width;
        int64_t bad = 0;
        for (int64_t x = 0; x < width; x += block) {
            const int64_t x_end = std::min(width, x + block);
            for (int64_t y = row; y < row_end; ++y) {
                const int64_t line = border_index(call_.starts[3 * n + 1] + y, call_.image_shape[1], call_.border);
                char* const values = target + y * o.stride[3];
                if (plane < 0 || line < 0) {
                    fill(x, x_end, affine, values);
                } else {
                    const char* const pixels = source + (line - call_.window_start[1]) * w.stride[2];
                    bad += row_part(pixels, x, x_end, affine, values);
                }
            }
        }
        return bad;
    }

  private:
    void enter_tile(int64_t n) {
        tile_ = n;
        const int64_t start = call_.starts[3 * n + 2];
        const int64_t width = call_.out.shape[4];
        const int64_t size = call_.image_shape[2];
        inside_ = std::clamp<int64_t>(-start, 0, width);
        inside_end_ = std::clamp<int64_t>(size - start, inside_, width);
        first_ = (start + inside_ - call_.window_start[2]) * call_.window.stride[3];
        for (int64_t x = 0; x < width; ++x) {
            if (x == inside_) x = inside_end_;
            if (x == width) break;
            columns_[x] =
                (border_index(start + x, size, call_.border) - call_.window_start[2]) * call_.window.stride[3];
        }
    }

    int64_t row_part(const char* pixels, int64_t x, int64_t x_end, const Affine& affine, char* values) {
        int64_t bad = border_part(pixels, x, std::min(x_end, inside_), affine, values);
        const int64_t begin = std::max(x, inside_);
        const int64_t end = std::min(x_end, inside_end_);
        if (begin < end) {
            const int64_t stride = call_.window.stride[3];
            const char* const from = pixels + first_ + (begin - inside_) * stride;
            if (stride == pixel_bytes_) {
                bad += emit(from, begin, end - begin, affine, values);
            } else {
                for (int64_t i = begin; i < end; i += kBlock) {
                    const int64_t count = std::min(kBlock, end - i);
                    pack_any(pixel_bytes_, from + (i - begin) * stride, stride, count, buffer_);
                    bad += emit(buffer_, i, count, affine, values);
                }
            }
        }
        return bad + border_part(pixels, std::max(x, inside_end_), x_end, affine, values);
    }

    int64_t border_part(const char* pixels, int64_t x, int64_t x_end, const Affine& affine, char* values) {
        if (x >= x_end) return 0;
        if (call_.border == Border::constant) {
            fill(x, x_end, affine, values);
            return 0;
        }
        int64_t bad = 0;
        for (int64_t i = x; i < x_end; i += kBlock) {
            const int64_t count = std::min(kBlock, x_end - i);
            pack_table_any(pixel_bytes_, pixels, columns_ + i, count, buffer_);
            bad += emit(buffer_, i, count, affine, values);
        }
        return bad;
    }

    // Adjacent pixels to columns x .. x + count of a row of values.
    int64_t emit(const char* pixels, int64_t x, int64_t count, const Affine& affine, char* values) {
        const int64_t stride = call_.out.stride[4];
        const bool wide = call_.window.dtype == DType::f16;
        const bool narrow = call_.out.dtype == DType::f16;
        const bool adjacent = stride == value_bytes_;
        const bool direct = adjacent && !narrow && reinterpret_cast<uintptr_t>(values) % alignof(float) == 0;
        if (direct && !wide) return convert_(pixels, count, affine, reinterpret_cast<float*>(values) + x);
        int64_t bad = 0;
        for (int64_t i = 0; i < count; i += kBlock) {
            const int64_t part = std::min(kBlock, count - i);
            const char* from = pixels + i * pixel_bytes_;
            char* const to = values + (x + i) * stride;
            if (wide) {
                widen_row(from, part, widened_);
                from = reinterpret_cast<const char*>(widened_);
            }
            float* const results = direct ? reinterpret_cast<float*>(to) : results_;
            bad += convert_(from, part, affine, results);
            if (direct) continue;
            if (narrow && adjacent) {
                narrow_row(results, part, to);
                continue;
            }
            for (int64_t j = 0; j < part; ++j) put(results[j], to + j * stride);
        }
        return bad;
    }

    void put(float value, char* to) const {
        if (call_.out.dtype == DType::f16) {
            const half small = half_of_float(value);
            memcpy(to, &small, sizeof(half));
        } else {
            memcpy(to, &value, sizeof(float));
        }
    }

    void fill(int64_t x, int64_t x_end, const Affine& affine, char* values) {
        const float value = constant_value(affine);
        for (int64_t i = x; i < x_end; ++i) put(value, values + i * call_.out.stride[4]);
    }

    float constant_value(const Affine& a) const {
        return border_value(call_.window.dtype, call_.affine, call_.constant, a.low, a.high, a.offset, a.divisor);
    }

    const TileGather& call_;
    const ConvertRow convert_;
    const int64_t pixel_bytes_;
    const int64_t value_bytes_;
    int64_t* const columns_;  // window offsets of the columns outside the image
    int64_t tile_ = -1;
    int64_t inside_ = 0;  // columns [inside_, inside_end_) of the tile lie in the image
    int64_t inside_end_ = 0;
    int64_t first_ = 0;  // window offset of column inside_
    alignas(64) char buffer_[kBlock * 8];
    alignas(64) float widened_[kBlock];
    alignas(64) float results_[kBlock];
};

}  // namespace gather

int64_t tile_gather(const TileGather& call, int threads) {
    const int64_t* shape = call.out.shape;
    const int64_t bands = (shape[3] + gather::kBandRows - 1) / gather::kBandRows;
    const int64_t items = shape[0] * shape[1] * shape[2] * bands;
    if (items == 0 || shape[4] == 0) return 0;
    const int workers = worker_count(items * std::min(shape[3], gather::kBandRows) * shape[4], threads);
    const auto columns = std::make_unique<int64_t[]>(static_cast<size_t>(workers * shape[4]));
    std::atomic<int64_t> bad{0};
    parallel_for(items, workers, [&](int worker, int64_t begin, int64_t end) {
        gather::Gatherer gatherer(call, columns.get() + worker * shape[4]);
        int64_t found = 0;
        for (int64_t item = begin; item < end; ++item) {
            // Channels follow each other within a band: those of a channels-last image share cache lines.
            const int64_t c = item % shape[1];
            const int64_t row = item / shape[1] % bands * gather::kBandRows;
            const int64_t z = item / shape[1] / bands % shape[2];
            const int64_t n = item / shape[1] / bands / shape[2];
            found += gatherer.band(n, c, z, row, std::min(shape[3], row + gather::kBandRows));
        }
        bad += found;
    });
    return bad;
}

}  // namespace unet_rt
