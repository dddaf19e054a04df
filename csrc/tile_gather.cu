// CUDA kernel. A thread makes a vector, 16 bytes of the wider of pixels and tile where alignment allows, of each of
// some rows of a tile. Inside the window it loads all their pixels at once and does no border arithmetic; at borders
// and ragged ends it goes row by row.
#include "kernels_cuda.h"
#include "pixel.h"

namespace unet_rt::cuda {
namespace gather_kernel {

constexpr int kChannels = 16;  // per launch

template <class Compute>
struct Channel {
    Compute low, high, offset, divisor;
    float reciprocal;  // 1 / divisor, or 0 where quotient_by() does not serve
    float beyond;      // value of the constant border
};

template <class T>
constexpr bool is_small_integer = sizeof(T) <= 2;
template <>
constexpr bool is_small_integer<half> = false;

// clipped() of a number that is not NaN, to bounds that reciprocal_serves() lets pass: none is a negative zero.
UNET_RT_HD float limited(float x, float low, float high) {
#if defined(__CUDA_ARCH__)
    return fminf(fmaxf(x, low), high);
#else
    return clipped(x, low, high);
#endif
}

// Integers of at most 16 bits, packed into words, as floats: exponent and mantissa of 2^23 + x are put together from
// their bytes in one instruction, and 2^23 is subtracted exactly. Signed ones have their range moved up before.
template <class T, int kCount>
UNET_RT_HD void widen_integers(const uint32_t* words, float (&values)[kCount]) {
#if defined(__CUDA_ARCH__)
    constexpr bool kSigned = T(-1) < T(0);
    constexpr uint32_t kShift = kSigned ? (sizeof(T) == 1 ? 0x80808080u : 0x80008000u) : 0u;
    constexpr float kMoved = 8388608.0f + (kSigned ? (sizeof(T) == 1 ? 128.0f : 32768.0f) : 0.0f);
    UNET_RT_UNROLL
    for (int i = 0; i < kCount; ++i) {
        const uint32_t word = words[i * static_cast<int>(sizeof(T)) / 4] ^ kShift;
        const uint32_t bytes = sizeof(T) == 1 ? 0x7440u | (i % 4) : (i % 2 == 0 ? 0x7410u : 0x7432u);
        values[i] = __uint_as_float(__byte_perm(word, 0x4b000000u, bytes)) - kMoved;
    }
#else
    T pixels[kCount];
    memcpy(pixels, words, sizeof(pixels));
    for (int i = 0; i < kCount; ++i) values[i] = static_cast<float>(pixels[i]);
#endif
}

template <class T, int kCount>
UNET_RT_HD void convert(const T (&pixels)[kCount], const Channel<typename Pixel<T>::Compute>& channel, bool affine,
                        float (&values)[kCount]) {
    using Compute = typename Pixel<T>::Compute;
    const auto value = [](T pixel) {
        if constexpr (sizeof(T) == 2 && !is_small_integer<T>)
            return widened(pixel);
        else
            return Pixel<T>::value(pixel);
    };
    if (!affine) {
        UNET_RT_UNROLL
        for (int i = 0; i < kCount; ++i) values[i] = static_cast<float>(value(pixels[i]));
        return;
    }
    const Compute low = channel.low, high = channel.high, offset = channel.offset, divisor = channel.divisor;
    if constexpr (is_small_integer<T>) {
        const float reciprocal = channel.reciprocal;
        if (reciprocal != 0.0f) {
            UNET_RT_UNROLL
            for (int i = 0; i < kCount; ++i)
                values[i] = quotient_by(limited(value(pixels[i]), low, high) - offset, divisor, reciprocal);
            return;
        }
    }
    UNET_RT_UNROLL
    for (int i = 0; i < kCount; ++i)
        values[i] = static_cast<float>(normalised(value(pixels[i]), low, high, offset, divisor));
}

// Groups of kRows rows per thread: more of them where each takes little time.
template <class T>
constexpr int kTurnsOf = sizeof(T) <= 2 ? 2 : 1;

// Samples of 16 bytes of the wider of pixels and tile.
template <class T, class Out>
constexpr int kWidest = sizeof(Out) == 2 && sizeof(T) <= 2 ? 8 : 4;

// Out: float or half. Vectors of 8 samples are for rows that begin at multiples of them; those of 4 for all.
template <class T, class Out, int kVector>
struct Body {
    static constexpr int kBlocks = sizeof(T) >= 4 ? 2 : 3;
    static constexpr int kTurns = kTurnsOf<T>;

    const char* window;
    int64_t window_stride[4];
    int64_t window_start[3];
    int64_t held[3];
    int64_t image_shape[3];
    char* out;
    int64_t out_stride[5];
    Rows rows;  // groups of kRows x kTurns rows
    uint32_t height;
    Divider depth;
    uint32_t planes;
    Border border;
    bool affine;
    uint64_t* non_finite;
    Table<int64_t> starts;
    Channel<typename Pixel<T>::Compute> channels[kChannels];

    // Place in the window of the pixel that stands for pixel `i` of an axis; -1: the constant.
    UNET_RT_HD int64_t found(int64_t i, int axis) const {
        const int64_t pixel = border_index(i, image_shape[axis], border);
        if (pixel < 0) return -1;
        const int64_t inside = pixel - window_start[axis];
        return inside < 0 ? 0 : (inside < held[axis] ? inside : held[axis] - 1);
    }

    // The same for pixels that no more than one reflection reaches; `reached` becomes false for others.
    UNET_RT_HD int64_t found_near(int64_t i, int axis, bool& reached) const {
        const int64_t last = image_shape[axis] - 1;
        int64_t pixel = i;
        if (border == Border::mirror) {
            pixel = i < 0 ? -i : (i > last ? 2 * last - i : i);
            reached = reached && pixel >= 0 && pixel <= last;
        } else if (i < 0 || i > last) {
            if (border == Border::constant) return -1;
            pixel = i < 0 ? 0 : last;
        }
        const int64_t inside = pixel - window_start[axis];
        return inside < 0 ? 0 : (inside < held[axis] ? inside : held[axis] - 1);
    }

    UNET_RT_HD void operator()(const Place& at) const {
        const uint32_t item = at.block_x * kThreads + at.thread;
        if (item >= rows.items) return;
        const uint32_t group = rows.vectors.quotient(item);
        const uint32_t n = at.block_z;
        const int64_t start_x = starts.at(n, 2);
        // Where rows begin at multiples of a vector, all of the thread's are at the same place in theirs.
        const uint32_t x = (item - group * rows.vectors.divisor) * kVector;
        const int64_t first = start_x + x - window_start[2];
        const bool whole = rows.step == kVector && (kVector == 8 || !rows.peeled) && x + kVector <= rows.width &&
                           first >= 0 && first + kVector <= held[2];
        uint64_t bad = 0;
        for (uint32_t plane = at.block_y; plane < planes; plane += at.blocks_y) {
            const uint32_t c = depth.quotient(plane);
            const uint32_t z = plane - c * depth.divisor;
            const int64_t slice = found(starts.at(n, 0) + z, 0);
            uint32_t y = group * (kRows * kTurns);
            int64_t line = starts.at(n, 1) + y - window_start[1];
            char* to = out + n * out_stride[0] + c * out_stride[1] + z * out_stride[2] + y * out_stride[3];
            const char* const from = window + c * window_stride[0] + slice * window_stride[1];
            UNET_RT_ROLLED
            for (int turn = 0; turn < kTurns && y < height; ++turn) {
                uint32_t made = 0;  // rows, bit by bit
                if (slice >= 0 && y + kRows <= height && line >= 0 && line + kRows <= held[1]) {
                    const char* const own = from + line * window_stride[2];
                    if (whole) {
                        all(own + first * window_stride[3], to + x * sizeof(Out), c, bad);
                        made = (1u << kRows) - 1;
                    }
                    if constexpr (kVector == 4) {
                        if (rows.peeled) made = four(own, start_x, item, group, to, c, bad);
                    }
                }
                if (made != (1u << kRows) - 1)
                    others(made, from, slice, start_x, item, group, line, height - y, to, c, bad);
                y += kRows, line += kRows, to += kRows * out_stride[3];
            }
        }
        if (bad != 0 && non_finite != nullptr) add_to(non_finite, bad);
    }

    // Of `count` rows, the first of which stands for the window's row `line`, those that are not `made`, one by one.
    UNET_RT_HD void others(uint32_t made, const char* from, int64_t slice, int64_t start_x, uint32_t item,
                           uint32_t group, int64_t line, uint32_t count, char* to, uint32_t c, uint64_t& bad) const {
        UNET_RT_ROLLED
        for (uint32_t r = 0; r < kRows && r < count; ++r) {
            if ((made >> r & 1) != 0) continue;
            char* const row = to + r * out_stride[3];
            const auto span = rows.span(item, group, row, sizeof(Out), rows.width);
            const int64_t own = found(line + window_start[1] + r, 1);
            bad += vector(from + own * window_stride[2], (slice | own) >= 0, start_x, span, row, channels[c]);
        }
    }

    UNET_RT_HD void load_pixels(const char* const (&source)[kRows], const bool (&wanted)[kRows], uint64_t alignment,
                                T (&pixels)[kRows][kVector]) const {
        if (window_stride[3] == static_cast<int64_t>(sizeof(T))) {
            constexpr int kBytes = kVector * static_cast<int>(sizeof(T));
            uint32_t words[kRows][kBytes / 4];
            load_rows<kBytes>(source, wanted, alignment, words);
            memcpy(pixels, words, sizeof(pixels));
            return;
        }
        UNET_RT_UNROLL
        for (int r = 0; r < kRows; ++r) {
            if (!wanted[r]) continue;
            UNET_RT_UNROLL
            for (int i = 0; i < kVector; ++i) pixels[r][i] = load_one<T>(source[r] + i * window_stride[3]);
        }
    }

    // Pixels to results at an aligned place.
    UNET_RT_HD void finish(const T (&pixels)[kVector], char* to, const Channel<typename Pixel<T>::Compute>& channel,
                           uint64_t& bad) const {
        float values[kVector];
        convert(pixels, channel, affine, values);
        store_results(to, values, static_cast<Out*>(nullptr));
        UNET_RT_UNROLL
        for (int i = 0; i < kVector; ++i) bad += Pixel<T>::non_finite(pixels[i]);
    }

    // The vectors at `from` and `to`, and at the same place of the rows that follow: kRows in all.
    UNET_RT_HD void all(const char* from, char* to, uint32_t c, uint64_t& bad) const {
        const char* source[kRows];
        bool wanted[kRows];
        uint64_t alignment = 0;
        UNET_RT_UNROLL
        for (int r = 0; r < kRows; ++r) {
            source[r] = from;
            wanted[r] = true;
            alignment |= address_of(from);
            from += window_stride[2];
        }
        const Channel<typename Pixel<T>::Compute>& channel = channels[c];
        if constexpr (is_small_integer<T>) {
            // As nearly always: adjacent integers, divided by multiplication. Decided for all rows at once.
            if (window_stride[3] == static_cast<int64_t>(sizeof(T)) && affine && channel.reciprocal != 0.0f) {
                constexpr int kBytes = kVector * static_cast<int>(sizeof(T));
                uint32_t words[kRows][kBytes / 4];
                load_rows<kBytes>(source, wanted, alignment, words);
                const float low = channel.low, high = channel.high, offset = channel.offset, divisor = channel.divisor,
                            reciprocal = channel.reciprocal;
                UNET_RT_UNROLL
                for (int r = 0; r < kRows; ++r) {
                    float values[kVector];
                    widen_integers<T>(words[r], values);
                    UNET_RT_UNROLL
                    for (int i = 0; i < kVector; ++i)
                        values[i] = quotient_by(limited(values[i], low, high) - offset, divisor, reciprocal);
                    store_results(to, values, static_cast<Out*>(nullptr));
                    to += out_stride[3];
                }
                return;
            }
        }
        T pixels[kRows][kVector];
        load_pixels(source, wanted, alignment, pixels);
        UNET_RT_UNROLL
        for (int r = 0; r < kRows; ++r) {
            finish(pixels[r], to, channel, bad);
            to += out_stride[3];
        }
    }

    // Vectors of kRows rows, the first of which are at `from` and `to`, as far as they are whole and held: their bits.
    UNET_RT_HD uint32_t four(const char* from, int64_t start_x, uint32_t item, uint32_t group, char* to, uint32_t c,
                             uint64_t& bad) const {
        const char* source[kRows];
        char* target[kRows];
        bool whole[kRows];
        uint64_t alignment = 0;
        uint32_t made = 0;
        UNET_RT_UNROLL
        for (int r = 0; r < kRows; ++r) {
            char* const row = to + r * out_stride[3];
            const auto span = rows.span(item, group, row, sizeof(Out), rows.width);
            const int64_t first = start_x + span.x - window_start[2];
            whole[r] = span.whole && first >= 0 && first + kVector <= held[2];
            made |= whole[r] ? 1u << r : 0;
            source[r] = from + r * window_stride[2] + first * window_stride[3];
            target[r] = row + span.x * static_cast<int64_t>(sizeof(Out));
            alignment |= whole[r] ? address_of(source[r]) : 0;
        }
        if (made == 0) return 0;
        T pixels[kRows][kVector];
        load_pixels(source, whole, alignment, pixels);
        UNET_RT_UNROLL
        for (int r = 0; r < kRows; ++r)
            if (whole[r]) finish(pixels[r], target[r], channels[c], bad);
        return made;
    }

    UNET_RT_HD uint64_t vector(const char* from, bool inside, int64_t start_x, const Rows::Span& span, char* to,
                               const Channel<typename Pixel<T>::Compute>& channel) const {
        const int64_t first = start_x + span.x - window_start[2];
        uint64_t bad = 0;
        if (span.whole && inside && first >= 0 && first + kVector <= held[2]) {
            T pixels[kVector];
            load_many(from + first * window_stride[3], window_stride[3], pixels);
            finish(pixels, to + span.x * static_cast<int64_t>(sizeof(Out)), channel, bad);
            return bad;
        }
        // All loads at once where one reflection is enough.
        int32_t columns[kVector];
        bool near = inside && held[2] <= INT32_MAX;
        UNET_RT_UNROLL
        for (int i = 0; i < kVector; ++i) {
            const int64_t x = span.x + i;
            columns[i] = x >= span.begin && x < span.end ? static_cast<int32_t>(found_near(start_x + x, 2, near)) : -1;
        }
        if (near) {
            T pixels[kVector] = {};
            UNET_RT_UNROLL
            for (int i = 0; i < kVector; ++i)
                if (columns[i] >= 0) pixels[i] = load_one<T>(from + columns[i] * window_stride[3]);
            float values[kVector];
            convert(pixels, channel, affine, values);
            UNET_RT_UNROLL
            for (int i = 0; i < kVector; ++i) {
                const int64_t x = span.x + i;
                if (x < span.begin || x >= span.end) continue;
                store_result(to + x * out_stride[4], columns[i] >= 0 ? values[i] : channel.beyond,
                             static_cast<Out*>(nullptr));
                bad += columns[i] >= 0 ? Pixel<T>::non_finite(pixels[i]) : 0;
            }
            return bad;
        }
        for (int64_t x = span.begin; x < span.end; ++x) {
            float value[1] = {channel.beyond};
            const int64_t column = inside ? found(start_x + x, 2) : -1;
            if (column >= 0) {
                const T pixel[1] = {load_one<T>(from + column * window_stride[3])};
                convert(pixel, channel, affine, value);
                bad += Pixel<T>::non_finite(pixel[0]);
            }
            store_result(to + x * out_stride[4], value[0], static_cast<Out*>(nullptr));
        }
        return bad;
    }
};

template <class Out>
Rows rows_of(const Array& o, const char* data, int64_t vector, int64_t least, int64_t turns) {
    const int64_t strides[] = {moving(o, 0), moving(o, 1), moving(o, 2), moving(o, 3)};
    return cuda::rows_of((o.shape[3] + kRows * turns - 1) / (kRows * turns), o.shape[4], data, o.stride[4], strides,
                         sizeof(Out), vector, least);
}

template <class T, class Out, int kVector>
void run(const TileGather& call, const DeviceTable& starts, uint64_t* non_finite, Stream stream) {
    using Compute = typename Pixel<T>::Compute;
    const Array& o = call.out;
    Body<T, Out, kVector> body{};
    for (int axis = 0; axis < 4; ++axis) body.window_stride[axis] = call.window.stride[axis];
    for (int axis = 0; axis < 3; ++axis) {
        body.window_start[axis] = call.window_start[axis];
        body.held[axis] = call.window.shape[1 + axis];
        body.image_shape[axis] = call.image_shape[axis];
    }
    for (int axis = 0; axis < 5; ++axis) body.out_stride[axis] = o.stride[axis];
    body.depth = Divider(o.shape[2]);
    body.border = call.border;
    body.affine = call.affine;
    body.non_finite = non_finite;
    for (int64_t c = 0; c < o.shape[1]; c += kChannels) {
        const int64_t channels = std::min<int64_t>(kChannels, o.shape[1] - c);
        for (int64_t i = 0; i < channels; ++i) {
            const double low = call.low[c + i], high = call.high[c + i];
            const double offset = call.offset[c + i], divisor = call.divisor[c + i];
            Channel<Compute>& channel = body.channels[i];
            channel.low = static_cast<Compute>(low), channel.high = static_cast<Compute>(high);
            channel.offset = static_cast<Compute>(offset), channel.divisor = static_cast<Compute>(divisor);
            const auto by = static_cast<float>(divisor);
            const bool serves =
                reciprocal_serves(static_cast<float>(low), static_cast<float>(high), static_cast<float>(offset), by);
            channel.reciprocal = serves ? 1.0f / by : 0.0f;
            channel.beyond = border_value(call.window.dtype, call.affine, call.constant, low, high, offset, divisor);
        }
        body.window = call.window.data + c * call.window.stride[0];
        body.planes = static_cast<uint32_t>(channels * o.shape[2]);
        const int64_t most = starts.data == nullptr ? kTilesPerLaunch : kMostBlocks;
        for (int64_t n = 0; n < o.shape[0]; n += most) {
            const int64_t tiles = std::min(most, o.shape[0] - n);
            body.starts = table_of<int64_t>(call.starts, starts, 0, n, tiles);
            body.out = o.data + n * o.stride[0] + c * o.stride[1];
            body.rows = rows_of<Out>(o, body.out, kVector, kVector, body.kTurns);
            body.height = static_cast<uint32_t>(o.shape[3]);
            launch({blocks_for(body.rows.items), body.planes, tiles}, stream, body);
        }
    }
}

template <class T, class Out>
void run(const TileGather& call, const DeviceTable& starts, uint64_t* non_finite, Stream stream) {
    if constexpr (kWidest<T, Out> == 8) {
        const Rows rows = rows_of<Out>(call.out, call.out.data, 8, 4, kTurnsOf<T>);
        if (rows.step == 8 && !rows.peeled) return run<T, Out, 8>(call, starts, non_finite, stream);
    }
    run<T, Out, 4>(call, starts, non_finite, stream);
}

template <class T>
void run_to(const TileGather& call, const DeviceTable& starts, uint64_t* non_finite, Stream stream) {
    if (call.out.dtype == DType::f16)
        run<T, half>(call, starts, non_finite, stream);
    else
        run<T, float>(call, starts, non_finite, stream);
}

}  // namespace gather_kernel

void tile_gather(const TileGather& call, const DeviceTable& starts, uint64_t* non_finite, Stream stream) {
    using namespace gather_kernel;
    for (const int64_t size : call.out.shape)
        if (size == 0) return;
    switch (call.window.dtype) {
        case DType::u8:
            return run_to<uint8_t>(call, starts, non_finite, stream);
        case DType::i8:
            return run_to<int8_t>(call, starts, non_finite, stream);
        case DType::u16:
            return run_to<uint16_t>(call, starts, non_finite, stream);
        case DType::i16:
            return run_to<int16_t>(call, starts, non_finite, stream);
        case DType::u32:
            return run_to<uint32_t>(call, starts, non_finite, stream);
        case DType::i32:
            return run_to<int32_t>(call, starts, non_finite, stream);
        case DType::f16:
            return run_to<half>(call, starts, non_finite, stream);
        case DType::f32:
            return run_to<float>(call, starts, non_finite, stream);
        case DType::f64:
            return run_to<double>(call, starts, non_finite, stream);
    }
}

}  // namespace unet_rt::cuda
