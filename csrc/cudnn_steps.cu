// CUDA kernels of cudnn_steps.h. A thread has eight channels (16 bytes) of a sample, or a sample of a planar array.
#include "cudnn_steps.h"

#include "pixel.h"

namespace unet_rt::cuda {
namespace steps_kernel {

constexpr int64_t kVector = 8;  // channels

UNET_RT_HD char* sample(const Map& map, int64_t n, int64_t y, int64_t x) {
    return map.data + n * map.stride_n + y * map.stride_y + x * map.stride_x;
}

// Eight float16 as they lie in memory: pairs.
struct Eight {
    uint32_t pair[4];
};

UNET_RT_HD Eight load_eight(const char* from) {
    Eight value;
    load_aligned<4>(from, value.pair);
    return value;
}

// Of memory that the same launch writes: each thread what it then writes itself. Not through the read-only cache.
UNET_RT_HD Eight load_own(const char* from) {
#if defined(__CUDA_ARCH__)
    const uint4 four = *reinterpret_cast<const uint4*>(from);
    return {{four.x, four.y, four.z, four.w}};
#else
    return load_eight(from);
#endif
}

UNET_RT_HD void widen(const Eight& from, float (&values)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        values[2 * i] = widened(half{static_cast<uint16_t>(from.pair[i] & 0xffffu)});
        values[2 * i + 1] = widened(half{static_cast<uint16_t>(from.pair[i] >> 16)});
    }
}

UNET_RT_HD float larger(float a, float b) { return a > b || a != a ? a : b; }

// The larger of each; NaN wins.
UNET_RT_HD uint32_t larger_pair(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t result;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
#else
    const auto one = [](uint32_t p, uint32_t q) {
        const float x = widened(half{static_cast<uint16_t>(p)});
        const float y = widened(half{static_cast<uint16_t>(q)});
        return larger(x, y) == x || x != x ? p : q;
    };
    return one(a & 0xffffu, b & 0xffffu) | one(a >> 16, b >> 16) << 16;
#endif
}

// Samples (y, x) of one image and vectors of channels, numbered.
struct Items {
    Divider vectors, columns;
    uint32_t count = 0;
    uint32_t images = 0;

    Items() = default;
    Items(int64_t n, int64_t y, int64_t x, int64_t parts) : vectors(parts), columns(x) {
        const int64_t items = y * x * parts;
        if (items > INT32_MAX || n > INT32_MAX) throw std::length_error("an image has more than 2^31 vectors");
        count = static_cast<uint32_t>(items);
        images = static_cast<uint32_t>(n);
    }

    struct Spot {
        uint32_t y, x, part;
    };
    UNET_RT_HD Spot spot(uint32_t item) const {
        const uint32_t pixel = vectors.quotient(item);
        const uint32_t y = columns.quotient(pixel);
        return {y, pixel - y * columns.divisor, item - pixel * vectors.divisor};
    }
    Grid grid() const { return {blocks_for(count), images, 1}; }
};

// One thread's items: the same of every blocks_y-th image.
template <class Each>
UNET_RT_HD void each_image(const Items& items, const Place& at, const Each& each) {
    const uint32_t item = at.block_x * kThreads + at.thread;
    if (item >= items.count) return;
    const Items::Spot spot = items.spot(item);
    for (uint32_t n = at.block_y; n < items.images; n += at.blocks_y) each(n, spot);
}

template <bool kWide>
UNET_RT_HD float planar_value(const char* planar, int64_t index) {
    if constexpr (kWide) return load_one<float>(planar + 4 * index);
    return widened(load_one<half>(planar + 2 * index));
}

template <bool kWide>
struct Enter {
    Items items;
    const char* planar;
    int64_t channels, y, x;
    Map out;

    UNET_RT_HD void operator()(const Place& at) const {
        each_image(items, at, [&](int64_t n, const Items::Spot& spot) {
            float values[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int64_t c = spot.part * kVector + i;
                values[i] =
                    c < channels ? planar_value<kWide>(planar, ((n * channels + c) * y + spot.y) * x + spot.x) : 0.0f;
            }
            store_results(sample(out, n, spot.y, spot.x) + spot.part * 16, values, static_cast<half*>(nullptr));
        });
    }
};

constexpr int kAcross = 4;  // samples per thread

template <bool kWide>
struct First {
    Items items;  // vectors of filters, and groups of kAcross columns
    const char* planar;
    int64_t channels, in_y, in_x, before_y, before_x, filters, x;
    const float* weights;
    const float* bias;
    bool relu;
    Map out;

    UNET_RT_HD void operator()(const Place& at) const {
        each_image(items, at, [&](int64_t n, const Items::Spot& spot) {
            const int64_t filter = spot.part * kVector;
            const int64_t first = static_cast<int64_t>(spot.x) * kAcross;
            float sums[kAcross][8];
            float start[8];
            load_aligned<8>(reinterpret_cast<const char*>(bias + filter), reinterpret_cast<uint32_t*>(start));
#pragma unroll
            for (int p = 0; p < kAcross; ++p)
#pragma unroll
                for (int i = 0; i < 8; ++i) sums[p][i] = start[i];
            for (int64_t c = 0; c < channels; ++c) {
#pragma unroll
                for (int ky = 0; ky < 3; ++ky) {
                    const int64_t row = spot.y + ky - before_y;
                    if (row < 0 || row >= in_y) continue;
                    const int64_t line = ((n * channels + c) * in_y + row) * in_x;
                    float pixels[kAcross + 2];
#pragma unroll
                    for (int p = 0; p < kAcross + 2; ++p) {
                        const int64_t column = first + p - before_x;
                        pixels[p] = column >= 0 && column < in_x ? planar_value<kWide>(planar, line + column) : 0.0f;
                    }
#pragma unroll
                    for (int kx = 0; kx < 3; ++kx) {
                        float taps[8];
                        load_aligned<8>(
                            reinterpret_cast<const char*>(weights + ((c * 3 + ky) * 3 + kx) * filters + filter),
                            reinterpret_cast<uint32_t*>(taps));
#pragma unroll
                        for (int p = 0; p < kAcross; ++p)
#pragma unroll
                            for (int i = 0; i < 8; ++i)
                                sums[p][i] = fused_multiply_add(pixels[p + kx], taps[i], sums[p][i]);
                    }
                }
            }
#pragma unroll
            for (int p = 0; p < kAcross; ++p) {
                if (first + p >= x) break;
                if (relu) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) sums[p][i] = sums[p][i] < 0.0f ? 0.0f : sums[p][i];
                }
                store_results(sample(out, n, spot.y, first + p) + spot.part * 16, sums[p], static_cast<half*>(nullptr));
            }
        });
    }
};

template <bool kCrop>
struct Pool {
    Items items;  // windows, the incomplete ones at the end too where a crop may need them
    Map from, out, crop;
    int64_t y, x, start_y, start_x, crop_y, crop_x;

    UNET_RT_HD void operator()(const Place& at) const {
        each_image(items, at, [&](int64_t n, const Items::Spot& spot) {
            const int64_t top = 2 * static_cast<int64_t>(spot.y), left = 2 * static_cast<int64_t>(spot.x);
            const bool whole = top + 1 < y && left + 1 < x;
            Eight window[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t row = top + i / 2, column = left + i % 2;
                if (row < y && column < x) window[i] = load_eight(sample(from, n, row, column) + spot.part * 16);
            }
            if constexpr (kCrop) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int64_t row = top + i / 2 - start_y, column = left + i % 2 - start_x;
                    if (row >= 0 && row < crop_y && column >= 0 && column < crop_x)
                        store_aligned<16>(sample(crop, n, row, column) + spot.part * 16, window[i].pair);
                }
            }
            if (!whole) return;
            Eight largest;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                largest.pair[i] = larger_pair(larger_pair(window[0].pair[i], window[1].pair[i]),
                                              larger_pair(window[2].pair[i], window[3].pair[i]));
            store_aligned<16>(sample(out, n, spot.y, spot.x) + spot.part * 16, largest.pair);
        });
    }
};

// kSum: two operands; kAct: a slope below zero.
template <bool kSum, bool kAct>
struct Add {
    Items items;
    Map a, b, out;
    float slope;

    UNET_RT_HD void operator()(const Place& at) const {
        each_image(items, at, [&](int64_t n, const Items::Spot& spot) {
            const int64_t shift = spot.part * 16;
            const Eight left = load_own(sample(a, n, spot.y, spot.x) + shift);
            char* const to = sample(out, n, spot.y, spot.x) + shift;
            if constexpr (!kSum && !kAct) {
                store_aligned<16>(to, left.pair);
            } else {
                float values[8];
                widen(left, values);
                if constexpr (kSum) {
                    float other[8];
                    widen(load_own(sample(b, n, spot.y, spot.x) + shift), other);
#pragma unroll
                    for (int i = 0; i < 8; ++i) values[i] = values[i] + other[i];
                }
                if constexpr (kAct) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) values[i] = values[i] < 0.0f ? slope * values[i] : values[i];
                }
                store_results(to, values, static_cast<half*>(nullptr));
            }
        });
    }
};

template <bool kLinear>
struct Resize {
    Items items;  // of the output
    Map from, out;
    int64_t y, x;  // of the input
    Divider factor;
    float reciprocal;

    UNET_RT_HD void operator()(const Place& at) const {
        each_image(items, at, [&](int64_t n, const Items::Spot& spot) {
            char* const to = sample(out, n, spot.y, spot.x) + spot.part * 16;
            const int64_t shift = spot.part * 16;
            if constexpr (!kLinear) {
                const Eight value =
                    load_eight(sample(from, n, factor.quotient(spot.y), factor.quotient(spot.x)) + shift);
                store_aligned<16>(to, value.pair);
            } else {
                int64_t rows[2], columns[2];
                const float down = between(spot.y, y, rows), right = between(spot.x, x, columns);
                float values[8], corners[4][8];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    widen(load_eight(sample(from, n, rows[i / 2], columns[i % 2]) + shift), corners[i]);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const float above = corners[0][i] * (1.0f - right) + corners[1][i] * right;
                    const float below = corners[2][i] * (1.0f - right) + corners[3][i] * right;
                    values[i] = above * (1.0f - down) + below * down;
                }
                store_results(to, values, static_cast<half*>(nullptr));
            }
        });
    }

    // The two samples around an output sample, and the second one's weight.
    UNET_RT_HD float between(uint32_t place, int64_t size, int64_t (&around)[2]) const {
        float position = (static_cast<float>(place) + 0.5f) * reciprocal - 0.5f;
        position = position < 0.0f ? 0.0f : position;
        const auto low = static_cast<int64_t>(position);
        around[0] = low < size ? low : size - 1;
        around[1] = low + 1 < size ? low + 1 : size - 1;
        return position - static_cast<float>(low);
    }
};

UNET_RT_HD void store_planar(char* planar, int64_t index, float value) {
    store_result(planar + 2 * index, value, static_cast<half*>(nullptr));
}

template <int kFilters>
struct Head {
    Items items;  // samples
    Map from;
    char* planar;
    int64_t y, x;
    int32_t channels;
    Activation act;
    float bias[kFilters];
    float weights[kMostHeadWeights];  // (channels, kFilters)

    UNET_RT_HD void operator()(const Place& at) const {
        each_image(items, at, [&](int64_t n, const Items::Spot& spot) {
            const char* const pixel = sample(from, n, spot.y, spot.x);
            float sums[kFilters];
#pragma unroll
            for (int k = 0; k < kFilters; ++k) sums[k] = bias[k];
#pragma unroll 4
            for (int32_t c = 0; c < channels; c += 8) {
                float values[8];
                widen(load_eight(pixel + 2 * c), values);
#pragma unroll
                for (int i = 0; i < 8; ++i)
#pragma unroll
                    for (int k = 0; k < kFilters; ++k)
                        sums[k] = fused_multiply_add(values[i], weights[(c + i) * kFilters + k], sums[k]);
            }
            if (act == Activation::relu) {
#pragma unroll
                for (int k = 0; k < kFilters; ++k) sums[k] = sums[k] < 0.0f ? 0.0f : sums[k];
            } else if (act == Activation::sigmoid) {
#pragma unroll
                for (int k = 0; k < kFilters; ++k) sums[k] = sigmoid_f32(sums[k]);
            } else if (act == Activation::softmax) {
                float most = sums[0], total = 0.0f;
#pragma unroll
                for (int k = 1; k < kFilters; ++k) most = larger(sums[k], most);
#pragma unroll
                for (int k = 0; k < kFilters; ++k) total += sums[k] = exp_f32(sums[k] - most);
#pragma unroll
                for (int k = 0; k < kFilters; ++k) sums[k] = sums[k] / total;
            }
#pragma unroll
            for (int k = 0; k < kFilters; ++k)
                store_planar(planar, ((n * kFilters + k) * y + spot.y) * x + spot.x, sums[k]);
        });
    }
};

struct Leave {
    Items items;  // samples
    Map from;
    char* planar;
    int64_t y, x;
    int32_t filters;
    Activation act;

    UNET_RT_HD void operator()(const Place& at) const {
        each_image(items, at, [&](int64_t n, const Items::Spot& spot) {
            const char* const pixel = sample(from, n, spot.y, spot.x);
            float most = widened(load_one<half>(pixel)), total = 1.0f;
            if (act == Activation::softmax) {
                for (int32_t k = 1; k < filters; ++k) most = larger(widened(load_one<half>(pixel + 2 * k)), most);
                total = 0.0f;
                for (int32_t k = 0; k < filters; ++k) total += exp_f32(widened(load_one<half>(pixel + 2 * k)) - most);
            }
            for (int32_t k = 0; k < filters; ++k) {
                float value = widened(load_one<half>(pixel + 2 * k));
                if (act == Activation::relu) value = value < 0.0f ? 0.0f : value;
                if (act == Activation::sigmoid) value = sigmoid_f32(value);
                if (act == Activation::softmax) value = exp_f32(value - most) / total;
                store_planar(planar, ((n * filters + k) * y + spot.y) * x + spot.x, value);
            }
        });
    }
};

// ------------------------------------------------------------------------------- whether a convolution is what it
// claims

// The number at a place of a filled block: -1 to 1 in steps of 2^-15, rounded to float16.
UNET_RT_HD uint32_t number_at(uint64_t place) {
    auto hash = static_cast<uint32_t>(place) ^ static_cast<uint32_t>(place >> 32) * 0x9e3779b9u;
    hash = (hash ^ hash >> 16) * 0x7feb352du;
    hash = (hash ^ hash >> 15) * 0x846ca68bu;
    const auto steps = static_cast<int32_t>((hash ^ hash >> 16) & 0xffffu) - 32768;
    return narrowed(static_cast<float>(steps) * (1.0f / 32768.0f)).bits;
}

UNET_RT_HD Eight numbers_at(uint64_t vector) {
    Eight found;
#pragma unroll
    for (int i = 0; i < 4; ++i) found.pair[i] = number_at(8 * vector + 2 * i) | number_at(8 * vector + 2 * i + 1) << 16;
    return found;
}

// The vectors of a block, in lots that are the images of Items.
struct Vectors {
    Items items;
    int64_t count = 0;

    explicit Vectors(int64_t bytes) : count(bytes / 16) {
        if (bytes % 16 != 0) throw std::invalid_argument("a block that does not end on 16 bytes");
        items = Items((count + kLot - 1) / kLot, 1, std::min(std::max<int64_t>(count, 1), kLot), 1);
    }

    // One thread's vectors.
    template <class Each>
    UNET_RT_HD void each_vector(const Place& at, const Each& each) const {
        each_image(items, at, [&](int64_t lot, const Items::Spot& spot) {
            const int64_t vector = lot * kLot + spot.x;
            if (vector < count) each(vector);
        });
    }

    static constexpr int64_t kLot = 1 << 16;
};

struct Fill {
    Vectors vectors;
    char* block;

    UNET_RT_HD void operator()(const Place& at) const {
        vectors.each_vector(at,
                            [&](int64_t vector) { store_aligned<16>(block + 16 * vector, numbers_at(vector).pair); });
    }
};

// a * b + c of a and b that were float16: their product is exact, so that one rounding and two give the same.
UNET_RT_HD float add_product(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return fused_multiply_add(a, b, c);
#else
    return a * b + c;
#endif
}

struct CountWrong {
    Items items;  // vectors of filters, rows and columns: neighbours in a warp share the weights
    Map from;
    int64_t y, x, channels;
    Window window;
    const char* weights;
    const char* bias;
    bool relu;
    Map out;
    uint64_t* count;

    UNET_RT_HD void operator()(const Place& at) const {
        each_image(items, at, [&](int64_t n, const Items::Spot& spot) {
            const int64_t filter = static_cast<int64_t>(spot.y) * kVector;
            float sums[8] = {}, sizes[8];
            if (bias != nullptr) widen(load_eight(bias + 2 * filter), sums);
#pragma unroll
            for (int i = 0; i < 8; ++i) sizes[i] = fabsf(sums[i]);
            const int64_t taps = window.kernel_y * window.kernel_x * channels;
            for (int64_t ky = 0; ky < window.kernel_y; ++ky) {
                const int64_t row = spot.x * window.stride_y + ky * window.dilation_y - window.before_y;
                if (row < 0 || row >= y) continue;
                for (int64_t kx = 0; kx < window.kernel_x; ++kx) {
                    const int64_t column = spot.part * window.stride_x + kx * window.dilation_x - window.before_x;
                    if (column < 0 || column >= x) continue;
                    add_tap(sample(from, n, row, column),
                            weights + 2 * (filter * taps + (ky * window.kernel_x + kx) * channels), 2 * taps, sums,
                            sizes);
                }
            }
            float found[8];
            widen(load_eight(sample(out, n, spot.x, spot.part) + 2 * filter), found);
            uint64_t wrong = 0;
#pragma unroll
            for (int i = 0; i < 8; ++i) wrong += right(found[i], sums[i], sizes[i], taps + 1) ? 0 : 1;
            if (wrong > 0) add_to(count, wrong);
        });
    }

    // Products of a sample's channels and those of eight filters, which are `distance` bytes apart, and their sizes.
    UNET_RT_HD void add_tap(const char* pixel, const char* taps, int64_t distance, float (&sums)[8],
                            float (&sizes)[8]) const {
        for (int64_t c = 0; c < channels; c += kVector) {
            float values[8];
            widen(load_eight(pixel + 2 * c), values);
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                float tap[8];
                widen(load_eight(taps + k * distance + 2 * c), tap);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    sums[k] = add_product(values[i], tap[i], sums[k]);
                    sizes[k] = add_product(fabsf(values[i]), fabsf(tap[i]), sizes[k]);
                }
            }
        }
    }

    // Of K terms, whose sizes add up to `size`, sums in float32 are within K * 2^-24 * size here, and within
    // 1.25 K * 2^-23 * size where tensor cores cut off, in groups of four or more, instead of rounding: K * 2^-22 *
    // size covers both. The result is then rounded to 11 bits, or to 2^-24. Beyond float16 it is infinite. NaN is
    // wrong.
    UNET_RT_HD bool right(float found, float sum, float size, int64_t terms) const {
        constexpr float kLargest = 65504.0f;
        if (relu && sum < 0.0f) sum = 0.0f;
        const float inexact = static_cast<float>(terms) * size * (1.0f / 4194304.0f);
        const float allowed = inexact + (fabsf(sum) + inexact) * (1.0f / 2048.0f) + 1.0f / 33554432.0f;
        return fabsf(clipped(found, -kLargest, kLargest) - clipped(sum, -kLargest, kLargest)) <= allowed;
    }
};

struct CountBeside {
    Vectors vectors;
    const char* block;
    uint64_t start, stride_n, stride_y, stride_x;  // of the region, bytes
    uint64_t n, y, x, bytes;                       // bytes: of a sample
    uint64_t* count;

    UNET_RT_HD void operator()(const Place& at) const {
        vectors.each_vector(at, [&](int64_t vector) {
            if (inside(16 * static_cast<uint64_t>(vector))) return;
            const Eight found = load_eight(block + 16 * vector), filled = numbers_at(vector);
            uint64_t changed = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t differs = found.pair[i] ^ filled.pair[i];
                changed += ((differs & 0xffffu) != 0 ? 1 : 0) + (differs >> 16 != 0 ? 1 : 0);
            }
            if (changed > 0) add_to(count, changed);
        });
    }

    UNET_RT_HD bool inside(uint64_t place) const {
        if (place < start) return false;
        uint64_t rest = place - start;
        if (rest / stride_n >= n) return false;
        rest %= stride_n;
        if (rest / stride_y >= y) return false;
        rest %= stride_y;
        return rest / stride_x < x && rest % stride_x < bytes;
    }
};

int64_t vectors_of(int64_t channels) { return (channels + kVector - 1) / kVector; }

void require(const Map& map) {
    const int64_t all = static_cast<int64_t>(address_of(map.data)) | map.stride_n | map.stride_y | map.stride_x;
    if (all % 16 != 0) throw std::invalid_argument("a map of channels does not begin on 16 bytes");
}

template <int kFilters>
void head(const Map& from, int64_t n, int64_t y, int64_t x, int64_t channels, const float* weights, const float* bias,
          Activation act, char* planar, Stream stream) {
    Head<kFilters> body{};
    body.items = Items(n, y, x, 1);
    body.from = from;
    body.planar = planar;
    body.y = y;
    body.x = x;
    body.channels = static_cast<int32_t>(channels);
    body.act = act;
    for (int k = 0; k < kFilters; ++k) {
        body.bias[k] = bias[k];
        for (int64_t c = 0; c < channels; ++c) body.weights[c * kFilters + k] = weights[k * channels + c];
    }
    launch(body.items.grid(), stream, body);
}

template <bool kWide>
void enter(const char* planar, int64_t n, int64_t channels, int64_t y, int64_t x, const Map& out, Stream stream) {
    const Enter<kWide> body{Items(n, y, x, vectors_of(channels)), planar, channels, y, x, out};
    launch(body.items.grid(), stream, body);
}

}  // namespace steps_kernel

void steps_enter(const char* planar, bool wide, int64_t n, int64_t channels, int64_t y, int64_t x, const Map& out,
                 Stream stream) {
    using namespace steps_kernel;
    require(out);
    (wide ? enter<true> : enter<false>)(planar, n, channels, y, x, out, stream);
}

void steps_first(const char* planar, bool wide, int64_t n, int64_t channels, int64_t in_y, int64_t in_x,
                 int64_t before_y, int64_t before_x, const float* weights, const float* bias, int64_t filters,
                 bool relu, const Map& out, int64_t y, int64_t x, Stream stream) {
    using namespace steps_kernel;
    require(out);
    const Items items(n, y, (x + kAcross - 1) / kAcross, filters / kVector);
    if (wide) {
        const First<true> body{items,   planar, channels, in_y, in_x, before_y, before_x,
                               filters, x,      weights,  bias, relu, out};
        launch(items.grid(), stream, body);
    } else {
        const First<false> body{items,   planar, channels, in_y, in_x, before_y, before_x,
                                filters, x,      weights,  bias, relu, out};
        launch(items.grid(), stream, body);
    }
}

void steps_pool(const Map& from, int64_t n, int64_t y, int64_t x, int64_t channels, const Map& out, const Map& crop,
                int64_t start_y, int64_t start_x, int64_t crop_y, int64_t crop_x, Stream stream) {
    using namespace steps_kernel;
    require(from), require(out);
    if (crop.data == nullptr) {
        const Pool<false> body{Items(n, y / 2, x / 2, channels / kVector), from, out, crop, y, x, 0, 0, 0, 0};
        launch(body.items.grid(), stream, body);
    } else {
        require(crop);
        const Pool<true> body{Items(n, (y + 1) / 2, (x + 1) / 2, channels / kVector),
                              from,
                              out,
                              crop,
                              y,
                              x,
                              start_y,
                              start_x,
                              crop_y,
                              crop_x};
        launch(body.items.grid(), stream, body);
    }
}

void steps_add(const Map& a, const Map& b, const Map& out, int64_t n, int64_t y, int64_t x, int64_t channels,
               float slope, Stream stream) {
    using namespace steps_kernel;
    require(a), require(out);
    const Items items(n, y, x, channels / kVector);
    const bool act = slope != 1.0f;
    if (b.data != nullptr) {
        require(b);
        if (act)
            launch(items.grid(), stream, Add<true, true>{items, a, b, out, slope});
        else
            launch(items.grid(), stream, Add<true, false>{items, a, b, out, slope});
    } else if (act) {
        launch(items.grid(), stream, Add<false, true>{items, a, b, out, slope});
    } else {
        launch(items.grid(), stream, Add<false, false>{items, a, b, out, slope});
    }
}

void steps_resize(const Map& from, const Map& out, int64_t n, int64_t y, int64_t x, int64_t channels, int64_t factor,
                  bool linear, Stream stream) {
    using namespace steps_kernel;
    require(from), require(out);
    const Items items(n, y * factor, x * factor, channels / kVector);
    const float reciprocal = 1.0f / static_cast<float>(factor);
    if (linear)
        launch(items.grid(), stream, Resize<true>{items, from, out, y, x, Divider(factor), reciprocal});
    else
        launch(items.grid(), stream, Resize<false>{items, from, out, y, x, Divider(factor), reciprocal});
}

void steps_head(const Map& from, int64_t n, int64_t y, int64_t x, int64_t channels, const float* weights,
                const float* bias, int64_t filters, Activation act, char* planar, Stream stream) {
    using namespace steps_kernel;
    require(from);
    if (filters < 1 || filters > kMostHeadFilters || filters * channels > kMostHeadWeights || channels % kVector != 0)
        throw std::invalid_argument("a head of too many filters or channels");
    switch (filters) {
        case 1:
            return head<1>(from, n, y, x, channels, weights, bias, act, planar, stream);
        case 2:
            return head<2>(from, n, y, x, channels, weights, bias, act, planar, stream);
        case 3:
            return head<3>(from, n, y, x, channels, weights, bias, act, planar, stream);
        case 4:
            return head<4>(from, n, y, x, channels, weights, bias, act, planar, stream);
        case 5:
            return head<5>(from, n, y, x, channels, weights, bias, act, planar, stream);
        case 6:
            return head<6>(from, n, y, x, channels, weights, bias, act, planar, stream);
        case 7:
            return head<7>(from, n, y, x, channels, weights, bias, act, planar, stream);
        default:
            return head<8>(from, n, y, x, channels, weights, bias, act, planar, stream);
    }
}

void steps_leave(const Map& from, int64_t n, int64_t y, int64_t x, int64_t filters, Activation act, char* planar,
                 Stream stream) {
    using namespace steps_kernel;
    const Leave body{Items(n, y, x, 1), from, planar, y, x, static_cast<int32_t>(filters), act};
    launch(body.items.grid(), stream, body);
}

void steps_fill(char* block, int64_t bytes, Stream stream) {
    using namespace steps_kernel;
    const Fill body{Vectors(bytes), block};
    launch(body.vectors.items.grid(), stream, body);
}

void steps_count_wrong(const Map& from, int64_t n, int64_t y, int64_t x, int64_t channels, const Window& window,
                       const char* weights, const char* bias, int64_t filters, bool relu, const Map& out, int64_t out_y,
                       int64_t out_x, uint64_t* count, Stream stream) {
    using namespace steps_kernel;
    require(from), require(out);
    if (channels % kVector != 0 || filters % kVector != 0)
        throw std::invalid_argument("a convolution whose channels or filters are no multiple of 8");
    const CountWrong body{
        Items(n, filters / kVector, out_y, out_x), from, y, x, channels, window, weights, bias, relu, out, count};
    launch(body.items.grid(), stream, body);
}

void steps_count_beside(const char* block, int64_t bytes, const Map& out, int64_t n, int64_t y, int64_t x,
                        int64_t channels, uint64_t* count, Stream stream) {
    using namespace steps_kernel;
    require(out);
    const int64_t size = 2 * channels, row = (x - 1) * out.stride_x + size, image = (y - 1) * out.stride_y + row;
    const int64_t start = out.data - block;
    if (size % 16 != 0 || start < 0 || start + (n - 1) * out.stride_n + image > bytes || out.stride_x < size ||
        out.stride_y < row || out.stride_n < image)
        throw std::invalid_argument("a region that overlaps itself or is not inside its block");
    const auto number = [](int64_t value) { return static_cast<uint64_t>(value); };
    const CountBeside body{Vectors(bytes),
                           block,
                           number(start),
                           number(out.stride_n),
                           number(out.stride_y),
                           number(out.stride_x),
                           number(n),
                           number(y),
                           number(x),
                           number(size),
                           count};
    launch(body.vectors.items.grid(), stream, body);
}

}  // namespace unet_rt::cuda
