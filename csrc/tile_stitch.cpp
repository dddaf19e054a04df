// CPU kernels. Work is cut into rows of samples (of tiles; for blending, where tiles overlap, of the total), and a row
// into blocks that stay in the first-level cache while an operation passes over all channels. Rows of adjacent float32
// are used where they lie, others go through a buffer.
#include "tile_stitch.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "half.h"
#include "parallel.h"
#include "simd.h"

namespace unet_rt {
namespace stitch {

// 512 samples: best value, class and channel of an argmax take 6 kB of the first-level cache.
constexpr int64_t kBlock = 512;

void widen(const char* in, int64_t stride, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) {
        half value;
        memcpy(&value, in + i * stride, sizeof(half));
        out[i] = float_of_half(value);
    }
}

UNET_RT_SIMD void sigmoid(const float* in, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = sigmoid_f32(in[i]);
}

UNET_RT_SIMD void threshold(const float* in, int64_t count, float bound, uint8_t below, uint8_t above, uint8_t* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = in[i] > bound ? above : below;
}

// The first two classes at once: with two classes that is all there is.
UNET_RT_SIMD void argmax_two(const float* a, const float* b, int64_t count, uint8_t value_a, uint8_t value_b,
                             uint8_t* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = takes_over(b[i], a[i]) ? value_b : value_a;
}

UNET_RT_SIMD void argmax_begin(const float* a, const float* b, int64_t count, int32_t value_a, int32_t value_b,
                               float* __restrict best, int32_t* __restrict value) {
    for (int64_t i = 0; i < count; ++i) {
        const bool take = takes_over(b[i], a[i]);
        best[i] = take ? b[i] : a[i];
        value[i] = take ? value_b : value_a;
    }
}

UNET_RT_SIMD void argmax_next(const float* in, int64_t count, int32_t candidate, float* __restrict best,
                              int32_t* __restrict value) {
    for (int64_t i = 0; i < count; ++i) {
        const bool take = takes_over(in[i], best[i]);
        best[i] = take ? in[i] : best[i];
        value[i] = take ? candidate : value[i];
    }
}

UNET_RT_SIMD void argmax_end(const int32_t* value, int64_t count, uint8_t* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<uint8_t>(value[i]);
}

UNET_RT_SIMD void maximum(const float* in, int64_t count, float* __restrict largest) {
    for (int64_t i = 0; i < count; ++i) largest[i] = in[i] > largest[i] ? in[i] : largest[i];
}

UNET_RT_SIMD void exp_and_sum(const float* in, int64_t count, const float* largest, float* sum, float* out) {
    for (int64_t i = 0; i < count; ++i) {
        const float e = exp_f32(in[i] - largest[i]);
        sum[i] += e;
        out[i] = e;
    }
}

UNET_RT_SIMD void divide(const float* in, const float* divisor, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = in[i] / divisor[i];
}

UNET_RT_SIMD void multiply_add(const float* weight, const float* tile, int64_t count, float* total) {
    for (int64_t i = 0; i < count; ++i) total[i] += weight[i] * tile[i];
}

UNET_RT_SIMD void add(const float* weight, int64_t count, float* total) {
    for (int64_t i = 0; i < count; ++i) total[i] += weight[i];
}

UNET_RT_SIMD int64_t zeros(const float* in, int64_t count) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += in[i] == 0.0f ? 1 : 0;
    return sum;
}

// Whether samples at `data` can be used as an array of T.
template <class T>
bool adjacent(const char* data, int64_t stride) {
    return stride == static_cast<int64_t>(sizeof(T)) && reinterpret_cast<uintptr_t>(data) % alignof(T) == 0;
}

// `count` values at `data` as float32: where they lie, or in `buffer`.
const float* load(const char* data, int64_t stride, DType dtype, int64_t count, float* buffer) {
    if (dtype == DType::f16) {
        if (stride == 2)
            widen_row(data, count, buffer);
        else
            widen(data, stride, count, buffer);
        return buffer;
    }
    if (adjacent<float>(data, stride)) return reinterpret_cast<const float*>(data);
    for (int64_t i = 0; i < count; ++i) memcpy(buffer + i, data + i * stride, sizeof(float));
    return buffer;
}

// Where to put `count` results for `data`: there, or in `buffer`, which put() then carries there.
template <class T>
T* place(char* data, int64_t stride, T* buffer) {
    return adjacent<T>(data, stride) ? reinterpret_cast<T*>(data) : buffer;
}

template <class T>
void put(const T* results, char* data, int64_t stride, int64_t count) {
    if (reinterpret_cast<const char*>(results) == data) return;
    for (int64_t i = 0; i < count; ++i) memcpy(data + i * stride, results + i, sizeof(T));
}

struct Buffers {
    alignas(64) float first[kBlock];
    alignas(64) float second[kBlock];
    alignas(64) float best[kBlock];
    alignas(64) float sum[kBlock];
    alignas(64) int32_t value[kBlock];
    alignas(64) float results[kBlock];
    alignas(64) uint8_t labels[kBlock];
};

// What happens to a row of samples, wherever its values come from.
struct Finish {
    Op op;
    int64_t channels;
    const float* bounds;
    const uint8_t* values;
    int64_t channel_stride;  // of the output, bytes
    int64_t stride;
};

// read(k, x, count, buffer): values x .. x + count of channel k of the row. `out`: the row in channel 0 of the output.
template <class Read>
void finish_row(const Finish& f, const Read& read, int64_t count, char* out, Buffers& b) {
    for (int64_t x = 0; x < count; x += kBlock) {
        const int64_t n = std::min(kBlock, count - x);
        char* const target = out + x * f.stride;
        const auto channel = [&](int64_t k) { return target + k * f.channel_stride; };
        switch (f.op) {
            case Op::copy:
                for (int64_t k = 0; k < f.channels; ++k) {
                    const float* const in = read(k, x, n, b.first);
                    if (adjacent<float>(channel(k), f.stride))
                        memcpy(channel(k), in, static_cast<size_t>(n) * sizeof(float));
                    else
                        put(in, channel(k), f.stride, n);
                }
                break;
            case Op::sigmoid:
                for (int64_t k = 0; k < f.channels; ++k) {
                    float* const to = place(channel(k), f.stride, b.results);
                    sigmoid(read(k, x, n, b.first), n, to);
                    put(to, channel(k), f.stride, n);
                }
                break;
            case Op::threshold:
                for (int64_t k = 0; k < f.channels; ++k) {
                    uint8_t* const to = place(channel(k), f.stride, b.labels);
                    threshold(read(k, x, n, b.first), n, f.bounds[k], f.values[0], f.values[1], to);
                    put(to, channel(k), f.stride, n);
                }
                break;
            case Op::argmax: {
                uint8_t* const to = place(target, f.stride, b.labels);
                if (f.channels == 1) {
                    memset(to, f.values[0], static_cast<size_t>(n));
                } else {
                    const float* const one = read(0, x, n, b.first);
                    const float* const two = read(1, x, n, b.second);
                    if (f.channels == 2) {
                        argmax_two(one, two, n, f.values[0], f.values[1], to);
                    } else {
                        argmax_begin(one, two, n, f.values[0], f.values[1], b.best, b.value);
                        for (int64_t k = 2; k < f.channels; ++k)
                            argmax_next(read(k, x, n, b.first), n, f.values[k], b.best, b.value);
                        argmax_end(b.value, n, to);
                    }
                }
                put(to, target, f.stride, n);
                break;
            }
            case Op::softmax: {
                memcpy(b.best, read(0, x, n, b.first), static_cast<size_t>(n) * sizeof(float));
                for (int64_t k = 1; k < f.channels; ++k) maximum(read(k, x, n, b.first), n, b.best);
                std::fill(b.sum, b.sum + n, 0.0f);
                for (int64_t k = 0; k < f.channels; ++k) {
                    float* const to = place(channel(k), f.stride, b.results);
                    exp_and_sum(read(k, x, n, b.first), n, b.best, b.sum, to);
                    put(to, channel(k), f.stride, n);
                }
                for (int64_t k = 0; k < f.channels; ++k) {
                    float* const to = place(channel(k), f.stride, b.results);
                    divide(load(channel(k), f.stride, DType::f32, n, b.first), b.sum, n, to);
                    put(to, channel(k), f.stride, n);
                }
                break;
            }
        }
    }
}

}  // namespace stitch

void tile_stitch(const TileStitch& call, int threads) {
    using namespace stitch;
    const Array& t = call.tiles;
    const Array& o = call.out;
    const int64_t tiles = t.shape[0];
    // Where channels do not meet, they are walked one after the other: memory then sees two streams, not 2 K.
    const bool apart = call.op == Op::copy || call.op == Op::sigmoid || call.op == Op::threshold;
    const int64_t passes = apart ? t.shape[1] : 1;
    const auto rows_before = std::make_unique<int64_t[]>(static_cast<size_t>(tiles + 1));
    int64_t samples = 0;
    for (int64_t n = 0; n < tiles; ++n) {
        const int64_t* size = call.size + 3 * n;
        rows_before[n + 1] = rows_before[n] + passes * size[0] * size[1];
        samples += size[0] * size[1] * size[2];
    }
    const int64_t rows = rows_before[tiles];
    parallel_for(rows, worker_count(samples * t.shape[1], threads), [&](int, int64_t begin, int64_t end) {
        Buffers buffers;
        Finish finish{call.op, t.shape[1] / passes, call.threshold, call.values, o.stride[0], o.stride[3]};
        int64_t n = std::upper_bound(rows_before.get(), rows_before.get() + tiles + 1, begin) - rows_before.get() - 1;
        for (int64_t row = begin; row < end; ++row) {
            while (row >= rows_before[n + 1]) ++n;
            const int64_t* from = call.source_start + 3 * n;
            const int64_t* to = call.target_start + 3 * n;
            const int64_t* size = call.size + 3 * n;
            const int64_t y = (row - rows_before[n]) % size[1];
            const int64_t z = (row - rows_before[n]) / size[1] % size[0];
            const int64_t first = (row - rows_before[n]) / size[1] / size[0];  // channel of this pass
            const char* const source = t.data + n * t.stride[0] + first * t.stride[1] + (from[0] + z) * t.stride[2] +
                                       (from[1] + y) * t.stride[3] + from[2] * t.stride[4];
            char* const target = o.data + first * o.stride[0] + (to[0] + z) * o.stride[1] + (to[1] + y) * o.stride[2] +
                                 to[2] * o.stride[3];
            const auto read = [&](int64_t k, int64_t x, int64_t count, float* buffer) {
                return load(source + k * t.stride[1] + x * t.stride[4], t.stride[4], t.dtype, count, buffer);
            };
            if (call.op == Op::threshold) finish.bounds = call.threshold + first;
            finish_row(finish, read, size[2], target, buffers);
        }
    });
}

void tile_blend(const TileBlend& call, int threads) {
    using namespace stitch;
    const Array& t = call.tiles;
    const int64_t tiles = t.shape[0];
    const int64_t channels = t.shape[1];
    // Workers own planes of the total (the weights are one more channel) along the first axis that is not of one
    // sample, and take the tiles in order: whatever the number of workers, a sample's sum has the same order.
    const int axis = call.total.shape[1] > 1 ? 0 : 1;
    int64_t samples = 0;
    for (int64_t n = 0; n < tiles; ++n) samples += call.size[3 * n] * call.size[3 * n + 1] * call.size[3 * n + 2];
    const int64_t planes = call.total.shape[1 + axis];
    const int workers = worker_count(samples * (channels + 1), threads);
    parallel_for((channels + 1) * planes, workers, [&](int, int64_t begin, int64_t end) {
        Buffers b;
        for (int64_t item = begin; item < end; ++item) {
            const int64_t k = item / planes;
            const int64_t plane = item % planes;
            const bool weights = k == channels;
            const Array& total = weights ? call.weight_total : call.total;
            const int64_t* stride = total.stride + (weights ? 0 : 1);
            char* const base = total.data + (weights ? 0 : k * total.stride[0]);
            for (int64_t n = 0; n < tiles; ++n) {
                const int64_t* from = call.source_start + 3 * n;
                const int64_t* to = call.target_start + 3 * n;
                const int64_t* size = call.size + 3 * n;
                if (plane < to[axis] || plane >= to[axis] + size[axis]) continue;
                const int64_t first[2] = {axis == 0 ? plane - to[0] : 0, axis == 1 ? plane - to[1] : 0};
                const int64_t last[2] = {axis == 0 ? first[0] + 1 : size[0], axis == 1 ? first[1] + 1 : size[1]};
                for (int64_t z = first[0]; z < last[0]; ++z) {
                    for (int64_t y = first[1]; y < last[1]; ++y) {
                        char* const row = base + (to[0] + z) * stride[0] + (to[1] + y) * stride[1] + to[2] * stride[2];
                        const char* const weight_row = call.weight.data + (from[0] + z) * call.weight.stride[0] +
                                                       (from[1] + y) * call.weight.stride[1] +
                                                       from[2] * call.weight.stride[2];
                        const char* const tile_row = t.data + n * t.stride[0] + k * t.stride[1] +
                                                     (from[0] + z) * t.stride[2] + (from[1] + y) * t.stride[3] +
                                                     from[2] * t.stride[4];
                        for (int64_t x = 0; x < size[2]; x += kBlock) {
                            const int64_t count = std::min(kBlock, size[2] - x);
                            char* const data = row + x * stride[2];
                            const int64_t step = call.weight.stride[2];
                            const float* const weight = load(weight_row + x * step, step, DType::f32, count, b.first);
                            float* const sums = place(data, stride[2], b.results);
                            if (sums == b.results) load(data, stride[2], DType::f32, count, b.results);
                            if (weights) {
                                add(weight, count, sums);
                            } else {
                                const char* const values = tile_row + x * t.stride[4];
                                multiply_add(weight, load(values, t.stride[4], t.dtype, count, b.second), count, sums);
                            }
                            put(sums, data, stride[2], count);
                        }
                    }
                }
            }
        }
    });
}

int64_t blend_finish(const BlendFinish& call, int threads) {
    using namespace stitch;
    const Array& t = call.total;
    const Array& w = call.weight_total;
    const Array& o = call.out;
    const Finish finish{call.op, t.shape[0], call.threshold, call.values, o.stride[0], o.stride[3]};
    const int64_t rows = t.shape[1] * t.shape[2];
    const int64_t width = t.shape[3];
    std::atomic<int64_t> uncovered{0};
    parallel_for(rows, worker_count(rows * width * t.shape[0], threads), [&](int, int64_t begin, int64_t end) {
        Buffers buffers;
        alignas(64) float weights[kBlock];
        alignas(64) float totals[kBlock];
        int64_t found = 0;
        for (int64_t row = begin; row < end; ++row) {
            const int64_t z = row / t.shape[2];
            const int64_t y = row % t.shape[2];
            const char* const weight_row = w.data + z * w.stride[0] + y * w.stride[1];
            const char* const total_row = t.data + z * t.stride[1] + y * t.stride[2];
            for (int64_t x = 0; x < width; x += kBlock)
                found += zeros(
                    load(weight_row + x * w.stride[2], w.stride[2], DType::f32, std::min(kBlock, width - x), weights),
                    std::min(kBlock, width - x));
            const auto read = [&](int64_t k, int64_t x, int64_t count, float* buffer) -> const float* {
                const char* const from = total_row + k * t.stride[0] + x * t.stride[3];
                const float* const total = load(from, t.stride[3], DType::f32, count, totals);
                divide(total, load(weight_row + x * w.stride[2], w.stride[2], DType::f32, count, weights), count,
                       buffer);
                return buffer;  // 0 / 0 is the NaN of an uncovered sample
            };
            finish_row(finish, read, width, o.data + z * o.stride[1] + y * o.stride[2], buffers);
        }
        uncovered += found;
    });
    return uncovered;
}

}  // namespace unet_rt
