// CUDA kernels. Placing: a thread makes a vector of samples of each of some rows of one tile; blending: of one row of
// the total, to which it adds the tiles that cover it in their order; finishing: of one row of the output.
#include <type_traits>

#include "kernels_cuda.h"

namespace unet_rt::cuda {
namespace stitch_kernel {

constexpr int kBounds = 64;  // thresholds per launch

template <Op op>
using Result = std::conditional_t<op == Op::argmax || op == Op::threshold, uint8_t, float>;

// Whether channels do not meet: then each is a plane of its own.
constexpr bool apart(Op op) { return op == Op::copy || op == Op::sigmoid || op == Op::threshold; }

// Vectors of adjacent samples of kLines rows of tiles: where those of the first channel are.
template <class In, int kLines>
struct TileRows {
    const char* data[kLines];
    int64_t channel_stride;
    int64_t stride;

    // kCount samples of each row, row after row.
    template <int kCount>
    UNET_RT_HD void load(int64_t k, float (&values)[kLines * kCount]) const {
        In samples[kLines][kCount];
        raw(k, samples);
        widen(samples, values);
    }

    // The same of two channels, whose loads are under way together.
    template <int kCount>
    UNET_RT_HD void load_two(int64_t k, int64_t l, float (&first)[kLines * kCount],
                             float (&second)[kLines * kCount]) const {
        In samples[kLines][kCount], others[kLines][kCount];
        raw(k, samples);
        raw(l, others);
        widen(samples, first);
        widen(others, second);
    }

    template <int kCount>
    UNET_RT_HD void raw(int64_t k, In (&samples)[kLines][kCount]) const {
        constexpr int kBytes = kCount * static_cast<int>(sizeof(In));
        const char* from[kLines];
        bool wanted[kLines];
        uint64_t alignment = 0;
        UNET_RT_UNROLL
        for (int r = 0; r < kLines; ++r) {
            from[r] = data[r] + k * channel_stride;
            wanted[r] = true;
            alignment |= address_of(from[r]);
        }
        if constexpr (kCount > 1) {
            if (stride == static_cast<int64_t>(sizeof(In))) {
                uint32_t words[kLines][kBytes / 4];
                load_rows<kBytes>(from, wanted, alignment, words);
                memcpy(samples, words, sizeof(words));
                return;
            }
        }
        UNET_RT_UNROLL
        for (int r = 0; r < kLines; ++r) {
            UNET_RT_UNROLL
            for (int i = 0; i < kCount; ++i) samples[r][i] = load_one<In>(from[r] + i * stride);
        }
    }

    template <int kCount>
    static UNET_RT_HD void widen(const In (&samples)[kLines][kCount], float (&values)[kLines * kCount]) {
        UNET_RT_UNROLL
        for (int i = 0; i < kLines * kCount; ++i) values[i] = widened(samples[i / kCount][i % kCount]);
    }
};

// The same of a blended total, divided by its weights. 0 / 0 is the NaN of a sample that no tile covers.
template <int kLines>
struct TotalRows {
    TileRows<float, kLines> total;
    const char* weight[kLines];
    int64_t weight_stride;

    template <int kCount>
    UNET_RT_HD void load(int64_t k, float (&values)[kLines * kCount]) const {
        float weights[kLines][kCount];
        total.template load<kCount>(k, values);
        UNET_RT_UNROLL
        for (int r = 0; r < kLines; ++r) load_many(weight[r], weight_stride, weights[r]);
        UNET_RT_UNROLL
        for (int i = 0; i < kLines * kCount; ++i) values[i] = values[i] / weights[i / kCount][i % kCount];
    }

    template <int kCount>
    UNET_RT_HD void load_two(int64_t k, int64_t l, float (&first)[kLines * kCount],
                             float (&second)[kLines * kCount]) const {
        float weights[kLines][kCount];
        total.template load_two<kCount>(k, l, first, second);
        UNET_RT_UNROLL
        for (int r = 0; r < kLines; ++r) load_many(weight[r], weight_stride, weights[r]);
        UNET_RT_UNROLL
        for (int i = 0; i < kLines * kCount; ++i) {
            first[i] = first[i] / weights[i / kCount][i % kCount];
            second[i] = second[i] / weights[i / kCount][i % kCount];
        }
    }
};

struct Finish {
    int64_t channels;
    float bounds[kBounds];  // per channel of the launch
    uint8_t values[256];
    int64_t channel_stride;  // of the output, bytes
};

// Stores kCount samples (adjacent and aligned if there are several) at each of kLines places, `shift` bytes on.
template <int kCount, int kLines, class T>
UNET_RT_HD void store(char* const (&to)[kLines], int64_t shift, const T (&values)[kLines * kCount]) {
    UNET_RT_UNROLL
    for (int r = 0; r < kLines; ++r) {
        if constexpr (kCount == 1) {
            store_result(to[r] + shift, values[r], static_cast<T*>(nullptr));
        } else {
            T row[kCount];
            UNET_RT_UNROLL
            for (int i = 0; i < kCount; ++i) row[i] = values[r * kCount + i];
            store_results(to[r] + shift, row, static_cast<T*>(nullptr));
        }
    }
}

// kCount samples of each of kLines rows: of channel k, or where channels meet of all from channel 0 on. `to`: the
// samples' places in the output's channel k.
template <Op op, int kCount, int kLines, class Source>
UNET_RT_HD void finish(const Finish& f, const Source& source, uint32_t k, char* const (&to)[kLines]) {
    constexpr int kAll = kCount * kLines;
    float values[kAll];
    if constexpr (op == Op::copy) {
        source.template load<kCount>(k, values);
        store<kCount>(to, 0, values);
    } else if constexpr (op == Op::sigmoid) {
        source.template load<kCount>(k, values);
        UNET_RT_UNROLL
        for (int i = 0; i < kAll; ++i) values[i] = sigmoid_f32(values[i]);
        store<kCount>(to, 0, values);
    } else if constexpr (op == Op::threshold) {
        source.template load<kCount>(k, values);
        uint8_t labels[kAll];
        const float bound = f.bounds[k];
        const uint8_t below = f.values[0], above = f.values[1];
        UNET_RT_UNROLL
        for (int i = 0; i < kAll; ++i) labels[i] = values[i] > bound ? above : below;
        store<kCount>(to, 0, labels);
    } else if constexpr (op == Op::argmax) {
        float best[kAll];
        uint32_t label[kAll];
        // A channel never takes over from itself.
        const int64_t second = f.channels > 1 ? 1 : 0;
        source.template load_two<kCount>(0, second, best, values);
        UNET_RT_UNROLL
        for (int i = 0; i < kAll; ++i) {
            const bool take = takes_over(values[i], best[i]);
            best[i] = take ? values[i] : best[i];
            label[i] = take ? f.values[1] : f.values[0];
        }
        UNET_RT_UNROLL_TWICE
        for (int64_t c = 2; c < f.channels; ++c) {
            source.template load<kCount>(c, values);
            const uint32_t next = f.values[c];
            UNET_RT_UNROLL
            for (int i = 0; i < kAll; ++i) {
                const bool take = takes_over(values[i], best[i]);
                best[i] = take ? values[i] : best[i];
                label[i] = take ? next : label[i];
            }
        }
        uint8_t labels[kAll];
        UNET_RT_UNROLL
        for (int i = 0; i < kAll; ++i) labels[i] = static_cast<uint8_t>(label[i]);
        store<kCount>(to, 0, labels);
    } else {
        float largest[kAll], sum[kAll];
        if (f.channels == 2) {
            float others[kAll];
            source.template load_two<kCount>(0, 1, values, others);
            UNET_RT_UNROLL
            for (int i = 0; i < kAll; ++i) {
                // The larger one's exponential is that of 0, which is 1, or NaN where it is infinite.
                const bool second = others[i] > values[i];
                largest[i] = second ? others[i] : values[i];
                const float smaller = exp_f32((second ? values[i] : others[i]) - largest[i]);
                const float one = largest[i] - largest[i] + 1.0f;
                sum[i] = one + smaller;
                values[i] = (second ? smaller : one) / sum[i];
                others[i] = (second ? one : smaller) / sum[i];
            }
            store<kCount>(to, 0, values);
            store<kCount>(to, f.channel_stride, others);
            return;
        }
        // Three passes over the channels, the later ones from the cache; exp() is cheaper than keeping its results.
        source.template load<kCount>(0, largest);
        UNET_RT_UNROLL_TWICE
        for (int64_t c = 1; c < f.channels; ++c) {
            source.template load<kCount>(c, values);
            UNET_RT_UNROLL
            for (int i = 0; i < kAll; ++i) largest[i] = values[i] > largest[i] ? values[i] : largest[i];
        }
        UNET_RT_UNROLL
        for (int i = 0; i < kAll; ++i) sum[i] = 0.0f;
        UNET_RT_ROLLED
        for (int64_t c = 0; c < f.channels; ++c) {
            source.template load<kCount>(c, values);
            UNET_RT_UNROLL
            for (int i = 0; i < kAll; ++i) sum[i] += exp_f32(values[i] - largest[i]);
        }
        UNET_RT_ROLLED
        for (int64_t c = 0; c < f.channels; ++c) {
            source.template load<kCount>(c, values);
            UNET_RT_UNROLL
            for (int i = 0; i < kAll; ++i) values[i] = exp_f32(values[i] - largest[i]) / sum[i];
            store<kCount>(to, c * f.channel_stride, values);
        }
    }
}

// Rows per thread.
template <Op op>
constexpr int kLinesOf = apart(op) ? kRows : (op == Op::argmax ? 2 : 1);

// Samples of a vector: 16 bytes of the wider of tiles and output.
template <class In, Op op>
constexpr int kWidest = sizeof(In) == 2 && sizeof(Result<op>) == 1 ? 8 : 4;

// The same, or 1 where an operation on all channels would find their rows in different positions to a vector's address.
template <Op op>
int64_t vector_of(const Array& out, int64_t vector) {
    const bool alike = moving(out, 0) % (vector * static_cast<int64_t>(sizeof(Result<op>))) == 0;
    return apart(op) || alike ? vector : 1;
}

// One part of every tile: where it begins, where it goes, its size.
struct Parts {
    Table<int32_t> source, target, size;

    // Whether the part lies inside the tile and the output.
    UNET_RT_HD bool fits(uint32_t n, const int64_t (&tile)[3], const int64_t (&whole)[3]) const {
        bool inside = true;
        for (int axis = 0; axis < 3; ++axis) {
            const int64_t from = source.at(n, axis), to = target.at(n, axis), extent = size.at(n, axis);
            inside = inside && from >= 0 && to >= 0 && extent >= 0 && from <= tile[axis] && to <= whole[axis] &&
                     extent <= tile[axis] - from && extent <= whole[axis] - to;
        }
        return inside;
    }
};

struct DeviceParts {
    DeviceTable source, target, size;
};

Parts parts_of(const int64_t* source, const int64_t* target, const int64_t* size, const DeviceParts& device,
               int64_t first, int64_t count) {
    return {table_of<int32_t>(source, device.source, 0, first, count),
            table_of<int32_t>(target, device.target, 0, first, count),
            table_of<int32_t>(size, device.size, 1, first, count)};
}

// ------------------------------------------------------------------------------------------------------------- placing

template <class In, Op op, int kVector>
struct Placing {
    static constexpr int kLines = kLinesOf<op>;
    static constexpr int kBlocks = 3;

    const char* tiles;
    int64_t tile_stride[5];
    int64_t tile_shape[3];
    char* out;
    int64_t out_stride[4];
    int64_t out_shape[3];
    Rows rows;  // groups of kLines rows
    Divider depth;
    uint32_t planes;
    Parts parts;
    Finish to_results;

    UNET_RT_HD void operator()(const Place& at) const {
        const uint32_t item = at.block_x * kThreads + at.thread;
        if (item >= rows.items) return;
        const uint32_t n = at.block_z;
        const uint32_t group = rows.vectors.quotient(item);
        const uint32_t y = group * kLines;
        const int64_t width = parts.size.at(n, 2);
        const int64_t height = parts.size.at(n, 1);
        if (y >= height) return;
        if (parts.size.device != nullptr && !parts.fits(n, tile_shape, out_shape)) return;
        const char* const first = tiles + n * tile_stride[0] + parts.source.at(n, 0) * tile_stride[2] +
                                  (parts.source.at(n, 1) + y) * tile_stride[3] + parts.source.at(n, 2) * tile_stride[4];
        char* const target = out + parts.target.at(n, 0) * out_stride[1] + (parts.target.at(n, 1) + y) * out_stride[2] +
                             parts.target.at(n, 2) * out_stride[3];
        for (uint32_t plane = at.block_y; plane < planes; plane += at.blocks_y) {
            const uint32_t k = depth.quotient(plane);
            const uint32_t z = plane - k * depth.divisor;
            if (z >= parts.size.at(n, 0)) continue;
            const char* const from = first + z * tile_stride[2];
            char* const to = target + k * out_stride[0] + z * out_stride[1];
            if (y + kLines <= height && lines(from, item, group, k, width, to)) continue;
            UNET_RT_ROLLED
            for (uint32_t r = 0; r < kLines && y + r < height; ++r)
                line(from + r * tile_stride[3], item, group, k, width, to + r * out_stride[2]);
        }
    }

    // A vector of each of kLines rows; false where not all are whole.
    UNET_RT_HD bool lines(const char* from, uint32_t item, uint32_t group, uint32_t k, int64_t width, char* to) const {
        TileRows<In, kLines> source;
        source.channel_stride = tile_stride[1], source.stride = tile_stride[4];
        char* places[kLines];
        if (rows.peeled) {
            bool whole = true;
            UNET_RT_UNROLL
            for (int r = 0; r < kLines; ++r) {
                char* const row = to + r * out_stride[2];
                const auto span = rows.span(item, group, row, sizeof(Result<op>), width);
                whole = whole && span.whole;
                source.data[r] = from + r * tile_stride[3] + span.x * tile_stride[4];
                places[r] = row + span.x * static_cast<int64_t>(sizeof(Result<op>));
            }
            if (!whole) return false;
        } else {  // all at the same place in their rows
            const uint32_t x = (item - group * rows.vectors.divisor) * kVector;
            if (rows.step != kVector || x + kVector > width) return false;
            from += x * tile_stride[4];
            to += x * sizeof(Result<op>);
            UNET_RT_UNROLL
            for (int r = 0; r < kLines; ++r) {
                source.data[r] = from, places[r] = to;
                from += tile_stride[3], to += out_stride[2];
            }
        }
        finish<op, kVector>(to_results, source, k, places);
        return true;
    }

    UNET_RT_HD void line(const char* from, uint32_t item, uint32_t group, uint32_t k, int64_t width, char* to) const {
        const auto span = rows.span(item, group, to, sizeof(Result<op>), width);
        TileRows<In, 1> source{{from + span.x * tile_stride[4]}, tile_stride[1], tile_stride[4]};
        if (span.whole) {
            char* const place[1] = {to + span.x * static_cast<int64_t>(sizeof(Result<op>))};
            finish<op, kVector>(to_results, source, k, place);
            return;
        }
        UNET_RT_ROLLED
        for (int64_t x = span.begin; x < span.end; ++x) {
            source.data[0] = from + x * tile_stride[4];
            char* const place[1] = {to + x * out_stride[3]};
            finish<op, 1>(to_results, source, k, place);
        }
    }
};

template <class Body>
void set_results(Body& body, Op op, int64_t channels, const Array& out, const float* threshold, const uint8_t* values) {
    Finish& f = body.to_results;
    f.channels = channels;
    f.channel_stride = out.stride[0];
    if (op == Op::threshold) std::copy(threshold, threshold + channels, f.bounds);
    if (op == Op::argmax) std::copy(values, values + channels, f.values);
    if (op == Op::threshold) std::copy(values, values + 2, f.values);
}

// Parts of tiles, where their tables are on the host.
struct Extent {
    int64_t largest[3] = {0, 0, 0};
    int64_t columns = 0;  // bits that are set in any part's first column
};

Extent extent_of(const TileStitch& call, int64_t first, int64_t count) {
    Extent extent;
    for (int64_t i = first; i < first + count; ++i) {
        const int64_t* size = call.size + 3 * i;
        if (size[0] == 0 || size[1] == 0 || size[2] == 0) continue;
        for (int axis = 0; axis < 3; ++axis) extent.largest[axis] = std::max(extent.largest[axis], size[axis]);
        extent.columns |= call.target_start[3 * i + 2];
    }
    return extent;
}

template <class In, Op op, int kVector>
void launch_placing(const TileStitch& call, const DeviceParts& device, const Extent& extent, const Rows& rows,
                    int64_t n, int64_t count, Stream stream) {
    const Array& t = call.tiles;
    const Array& o = call.out;
    const int64_t step = apart(op) ? kBounds : t.shape[1];
    for (int64_t k = 0; k < t.shape[1]; k += step) {
        const int64_t channels = std::min(step, t.shape[1] - k);
        Placing<In, op, kVector> body{};
        body.tiles = t.data + n * t.stride[0] + k * t.stride[1];
        body.out = o.data + k * o.stride[0];
        for (int axis = 0; axis < 5; ++axis) body.tile_stride[axis] = t.stride[axis];
        for (int axis = 0; axis < 4; ++axis) body.out_stride[axis] = o.stride[axis];
        for (int axis = 0; axis < 3; ++axis) body.tile_shape[axis] = t.shape[2 + axis];
        for (int axis = 0; axis < 3; ++axis) body.out_shape[axis] = o.shape[1 + axis];
        body.rows = rows;
        body.depth = Divider(extent.largest[0]);
        body.planes = static_cast<uint32_t>(extent.largest[0] * (apart(op) ? channels : 1));
        body.parts = parts_of(call.source_start, call.target_start, call.size, device, n, count);
        set_results(body, op, channels, o, call.threshold + (op == Op::threshold ? k : 0), call.values);
        launch({blocks_for(body.rows.items), body.planes, count}, stream, body);
    }
}

template <class In, Op op>
void place(const TileStitch& call, const DeviceParts& device, Stream stream) {
    constexpr int kMost = kWidest<In, op>;
    const Array& t = call.tiles;
    const Array& o = call.out;
    const bool on_device = device.size.data != nullptr;
    const int64_t most = on_device ? kMostBlocks : kTilesPerLaunch;
    const int64_t vector = vector_of<op>(o, kMost);
    for (int64_t n = 0; n < t.shape[0]; n += most) {
        const int64_t count = std::min(most, t.shape[0] - n);
        Extent extent;
        if (on_device) {  // parts begin anywhere in a row
            for (int axis = 0; axis < 3; ++axis) extent.largest[axis] = std::min(t.shape[2 + axis], o.shape[1 + axis]);
            extent.columns = 1;
        } else {
            extent = extent_of(call, n, count);
        }
        if (extent.largest[0] == 0 || extent.largest[1] == 0 || extent.largest[2] == 0) continue;
        const int64_t item = sizeof(Result<op>);
        const int64_t strides[] = {moving(o, 0), moving(o, 1), moving(o, 2), extent.columns * item};
        const int64_t groups = (extent.largest[1] + kLinesOf<op> - 1) / kLinesOf<op>;
        const Rows rows = rows_of(groups, extent.largest[2], o.data, o.stride[3], strides, item, vector,
                                  std::min<int64_t>(vector, 4));
        if constexpr (kMost == 8) {
            if (rows.step == 4) {
                launch_placing<In, op, 4>(call, device, extent, rows, n, count, stream);
                continue;
            }
        }
        launch_placing<In, op, kMost>(call, device, extent, rows, n, count, stream);
    }
}

// ------------------------------------------------------------------------------------------------------------ blending

// Which of up to 64 tiles lie in each of some equal pieces of an axis, bit by bit.
struct Pieces {
    static constexpr int kCount = 32;
    Divider length;  // samples per piece, at least those of a vector
    uint64_t tiles[kCount];

    Pieces() = default;
    explicit Pieces(int64_t extent) : length(std::max<int64_t>((extent + kCount - 1) / kCount, 4)), tiles{} {}

    void add(int64_t tile, int64_t first, int64_t end) {
        for (int64_t i = first / length.divisor; i <= (end - 1) / length.divisor; ++i) tiles[i] |= uint64_t{1} << tile;
    }

    UNET_RT_HD uint64_t at(uint32_t sample) const { return tiles[length.quotient(sample)]; }
};

UNET_RT_HD uint32_t lowest_bit(uint64_t mask) {
#if defined(__CUDA_ARCH__)
    return static_cast<uint32_t>(__ffsll(static_cast<long long>(mask))) - 1;
#else
    uint32_t bit = 0;
    while ((mask >> bit & 1) == 0) ++bit;
    return bit;
#endif
}

// The tiles of a launch whose tables are on the host, as the samples of the total see them.
struct Listed {
    struct Tile {
        int32_t target[3], size[3];
        int64_t tile, weight;  // bytes that sample (0, 0, 0) of the total would have from that of `tiles`, `weight`
    };
    Tile tiles[kTilesPerLaunch];
    Pieces lines, columns;  // of the box
};

// Tables: Listed, or Parts on the device.
template <class In, class Tables>
struct Blending {
    static constexpr int kVector = 4;
    static constexpr int kBlocks = 3;
    static constexpr bool kListed = std::is_same_v<Tables, Listed>;

    const char* tiles;
    int64_t tile_stride[5];
    int64_t tile_shape[3];
    const char* weight;
    int64_t weight_stride[3];
    char* total;
    int64_t total_stride[4];
    char* weight_total;
    int64_t weight_total_stride[3];
    int64_t total_shape[3];
    int64_t box[3];  // first sample of the total that the launch covers
    int64_t width;   // samples of it
    Rows rows, weight_rows;
    Divider depth;
    uint32_t channels;
    uint32_t planes;
    uint32_t count;
    Tables tables;

    // Planes are those of the total's channels and then those of the weights.
    UNET_RT_HD void operator()(const Place& at) const {
        const uint32_t item = at.block_x * kThreads + at.thread;
        for (uint32_t plane = at.block_y; plane < planes; plane += at.blocks_y) {
            const uint32_t k = depth.quotient(plane);
            const int64_t z = box[0] + plane - k * depth.divisor;
            const bool weights = k == channels;
            const Rows& own = weights ? weight_rows : rows;
            if (item >= own.items) continue;
            const uint32_t line = own.vectors.quotient(item);
            const int64_t y = box[1] + line;
            char* const to = weights ? weight_total + z * weight_total_stride[0] + y * weight_total_stride[1] +
                                           box[2] * weight_total_stride[2]
                                     : total + k * total_stride[0] + z * total_stride[1] + y * total_stride[2] +
                                           box[2] * total_stride[3];
            const int64_t stride = weights ? weight_total_stride[2] : total_stride[3];
            const auto span = own.span(item, line, to, sizeof(float), width);
            if (span.begin >= span.end) continue;
            uint64_t near = ~uint64_t{0};
            if constexpr (kListed)
                near = tables.lines.at(line) & (tables.columns.at(static_cast<uint32_t>(span.begin)) |
                                                tables.columns.at(static_cast<uint32_t>(span.end - 1)));
            add(near, k, weights, z, y, span, to, stride);
        }
    }

    // The tiles `near` of a launch's, or all where their tables are on the device.
    UNET_RT_HD void add(uint64_t near, uint32_t k, bool weights, int64_t z, int64_t y, const Rows::Span& span, char* to,
                        int64_t stride) const {
        float sums[kVector];
        bool loaded = false;
        const int64_t x = box[2] + span.x;  // may lie before the row
        // Where the first sample would be, were the total's coordinates the tile's.
        const char* first_weight = weight + z * weight_stride[0] + y * weight_stride[1] + x * weight_stride[2];
        const char* first_tile =
            tiles + k * tile_stride[1] + z * tile_stride[2] + y * tile_stride[3] + x * tile_stride[4];
        auto row = static_cast<uint32_t>(y), slice = static_cast<uint32_t>(z);
        keep(first_weight), keep(first_tile), keep(row), keep(slice);
        for (uint32_t n = 0; kListed ? near != 0 : n < count; ++n) {
            int64_t dx, extent;  // of the part: column of the vector's first sample, columns
            const char *w, *t;
            if constexpr (kListed) {
                n = lowest_bit(near);
                near &= near - 1;
                const Listed::Tile& tile = tables.tiles[n];
                if (slice - static_cast<uint32_t>(tile.target[0]) >= static_cast<uint32_t>(tile.size[0])) continue;
                if (row - static_cast<uint32_t>(tile.target[1]) >= static_cast<uint32_t>(tile.size[1])) continue;
                dx = x - tile.target[2], extent = tile.size[2];
                if (dx + kVector <= 0 || dx >= extent) continue;
                w = first_weight + tile.weight, t = first_tile + tile.tile;
            } else {
                const int64_t dz = z - tables.target.at(n, 0);
                const int64_t dy = y - tables.target.at(n, 1);
                if (dz < 0 || dy < 0 || dz >= tables.size.at(n, 0) || dy >= tables.size.at(n, 1)) continue;
                dx = x - tables.target.at(n, 2), extent = tables.size.at(n, 2);
                if (dx + kVector <= 0 || dx >= extent) continue;
                if (!tables.fits(n, tile_shape, total_shape)) continue;
                const int64_t away[3] = {tables.source.at(n, 0) - tables.target.at(n, 0),
                                         tables.source.at(n, 1) - tables.target.at(n, 1),
                                         tables.source.at(n, 2) - tables.target.at(n, 2)};
                w = first_weight + away[0] * weight_stride[0] + away[1] * weight_stride[1] + away[2] * weight_stride[2];
                t = first_tile + n * tile_stride[0] + away[0] * tile_stride[2] + away[1] * tile_stride[3] +
                    away[2] * tile_stride[4];
            }
            if (!loaded) {
                load_sums(span, to, stride, sums);
                loaded = true;
            }
            if (span.whole && dx >= 0 && dx + kVector <= extent) {
                float by[kVector];
                load_many(w, weight_stride[2], by);
                if (weights) {
                    UNET_RT_UNROLL
                    for (int i = 0; i < kVector; ++i) sums[i] += by[i];
                } else {
                    In samples[kVector];
                    load_many(t, tile_stride[4], samples);
                    UNET_RT_UNROLL
                    for (int i = 0; i < kVector; ++i) sums[i] += by[i] * widened(samples[i]);
                }
            } else {
                UNET_RT_UNROLL
                for (int i = 0; i < kVector; ++i) {
                    const int64_t own = span.x + i;
                    if (own < span.begin || own >= span.end || dx + i < 0 || dx + i >= extent) continue;
                    const float by = load_one<float>(w + i * weight_stride[2]);
                    sums[i] += weights ? by : by * widened(load_one<In>(t + i * tile_stride[4]));
                }
            }
        }
        if (!loaded) return;
        if (span.whole) {
            store_results(to + span.x * static_cast<int64_t>(sizeof(float)), sums, static_cast<float*>(nullptr));
        } else {
            UNET_RT_UNROLL
            for (int i = 0; i < kVector; ++i)
                if (span.x + i >= span.begin && span.x + i < span.end) store_one(to + (span.x + i) * stride, sums[i]);
        }
    }

    static UNET_RT_HD float own(const char* from) {
        float value;
        if (address_of(from) % sizeof(float) == 0)
            value = *reinterpret_cast<const float*>(from);
        else
            memcpy(&value, from, sizeof(float));
        return value;
    }

    // Not through load_bytes(): this memory is written, too.
    static UNET_RT_HD void load_sums(const Rows::Span& span, const char* to, int64_t stride, float (&sums)[kVector]) {
#if defined(__CUDA_ARCH__)
        if (span.whole) {
            const float4 four = *reinterpret_cast<const float4*>(to + span.x * static_cast<int64_t>(sizeof(float)));
            sums[0] = four.x, sums[1] = four.y, sums[2] = four.z, sums[3] = four.w;
            return;
        }
#endif
        UNET_RT_UNROLL
        for (int i = 0; i < kVector; ++i) {
            sums[i] = 0.0f;
            if (span.x + i >= span.begin && span.x + i < span.end) sums[i] = own(to + (span.x + i) * stride);
        }
    }
};

template <class In, class Tables>
void blend(const TileBlend& call, const DeviceParts& device, Stream stream) {
    const Array& t = call.tiles;
    const Array& o = call.total;
    const Array& w = call.weight_total;
    const bool on_device = device.size.data != nullptr;
    const int64_t most = on_device ? t.shape[0] : kTilesPerLaunch;
    for (int64_t n = 0; n < t.shape[0]; n += most) {
        const int64_t count = std::min(most, t.shape[0] - n);
        Blending<In, Tables> body{};
        int64_t first[3] = {0, 0, 0}, last[3];
        for (int axis = 0; axis < 3; ++axis) {
            last[axis] = on_device ? o.shape[1 + axis] : 0;
            if (!on_device) first[axis] = o.shape[1 + axis];
        }
        for (int64_t i = n; i < n + count && !on_device; ++i) {
            const int64_t* size = call.size + 3 * i;
            const int64_t* target = call.target_start + 3 * i;
            if (size[0] == 0 || size[1] == 0 || size[2] == 0) continue;
            for (int axis = 0; axis < 3; ++axis) {
                first[axis] = std::min(first[axis], target[axis]);
                last[axis] = std::max(last[axis], target[axis] + size[axis]);
            }
        }
        if (first[0] >= last[0] || first[1] >= last[1] || first[2] >= last[2]) continue;
        body.tiles = t.data + n * t.stride[0];
        body.weight = call.weight.data;
        body.total = o.data;
        body.weight_total = w.data;
        for (int axis = 0; axis < 5; ++axis) body.tile_stride[axis] = t.stride[axis];
        for (int axis = 0; axis < 4; ++axis) body.total_stride[axis] = o.stride[axis];
        for (int axis = 0; axis < 3; ++axis) {
            body.tile_shape[axis] = t.shape[2 + axis];
            body.weight_stride[axis] = call.weight.stride[axis];
            body.weight_total_stride[axis] = w.stride[axis];
            body.total_shape[axis] = o.shape[1 + axis];
            body.box[axis] = first[axis];
        }
        body.width = last[2] - first[2];
        const int64_t height = last[1] - first[1], depth = last[0] - first[0];
        const int64_t strides[] = {moving(o, 0), moving(o, 1), moving(o, 2)};
        const int64_t weight_strides[] = {moving(w, 0), moving(w, 1)};
        body.rows = rows_of(height, body.width, o.data + first[2] * o.stride[3], o.stride[3], strides, sizeof(float),
                            body.kVector, body.kVector);
        body.weight_rows = rows_of(height, body.width, w.data + first[2] * w.stride[2], w.stride[2], weight_strides,
                                   sizeof(float), body.kVector, body.kVector);
        body.depth = Divider(depth);
        body.channels = static_cast<uint32_t>(t.shape[1]);
        if ((t.shape[1] + 1) * depth > INT32_MAX) throw std::length_error("more than 2^31 planes in one array");
        body.planes = static_cast<uint32_t>((t.shape[1] + 1) * depth);
        body.count = static_cast<uint32_t>(count);
        if constexpr (std::is_same_v<Tables, Listed>) {
            body.tables.lines = Pieces(height), body.tables.columns = Pieces(body.width);
            for (int64_t i = 0; i < count; ++i) {
                const int64_t* source = call.source_start + 3 * (n + i);
                const int64_t* target = call.target_start + 3 * (n + i);
                const int64_t* size = call.size + 3 * (n + i);
                if (size[0] == 0 || size[1] == 0 || size[2] == 0) continue;
                Listed::Tile& tile = body.tables.tiles[i];
                tile.tile = i * t.stride[0];
                for (int axis = 0; axis < 3; ++axis) {
                    if (target[axis] > INT32_MAX || size[axis] > INT32_MAX)
                        throw std::length_error("more than 2^31 samples along an axis");
                    tile.target[axis] = static_cast<int32_t>(target[axis]);
                    tile.size[axis] = static_cast<int32_t>(size[axis]);
                    tile.tile += (source[axis] - target[axis]) * t.stride[2 + axis];
                    tile.weight += (source[axis] - target[axis]) * call.weight.stride[axis];
                }
                body.tables.lines.add(i, target[1] - first[1], target[1] - first[1] + size[1]);
                body.tables.columns.add(i, target[2] - first[2], target[2] - first[2] + size[2]);
            }
        } else {
            body.tables = parts_of(call.source_start, call.target_start, call.size, device, n, count);
        }
        launch({blocks_for(std::max(body.rows.items, body.weight_rows.items)), body.planes, 1}, stream, body);
    }
}

// ----------------------------------------------------------------------------------------------------------- finishing

template <Op op>
struct Finishing {
    static constexpr int kVector = 4;
    static constexpr int kBlocks = op == Op::softmax ? 3 : 4;

    const char* total;
    int64_t total_stride[4];
    const char* weight;
    int64_t weight_stride[3];
    char* out;
    int64_t out_stride[4];
    Rows rows;
    Divider depth;
    uint32_t planes;
    uint64_t* uncovered;
    Finish to_results;

    UNET_RT_HD void operator()(const Place& at) const {
        const uint32_t item = at.block_x * kThreads + at.thread;
        if (item >= rows.items) return;
        const uint32_t y = rows.vectors.quotient(item);
        for (uint32_t plane = at.block_y; plane < planes; plane += at.blocks_y) {
            const uint32_t k = depth.quotient(plane);
            const uint32_t z = plane - k * depth.divisor;
            char* const to = out + k * out_stride[0] + z * out_stride[1] + y * out_stride[2];
            const char* const totals = total + z * total_stride[1] + y * total_stride[2];
            const char* const weights = weight + z * weight_stride[0] + y * weight_stride[1];
            const auto span = rows.span(item, y, to, sizeof(Result<op>), rows.width);
            if (span.whole) {
                const TotalRows<1> source{{{totals + span.x * total_stride[3]}, total_stride[0], total_stride[3]},
                                          {weights + span.x * weight_stride[2]},
                                          weight_stride[2]};
                char* const place[1] = {to + span.x * static_cast<int64_t>(sizeof(Result<op>))};
                finish<op, kVector>(to_results, source, k, place);
            } else {
                UNET_RT_ROLLED
                for (int64_t x = span.begin; x < span.end; ++x) {
                    const TotalRows<1> source{{{totals + x * total_stride[3]}, total_stride[0], total_stride[3]},
                                              {weights + x * weight_stride[2]},
                                              weight_stride[2]};
                    char* const place[1] = {to + x * out_stride[3]};
                    finish<op, 1>(to_results, source, k, place);
                }
            }
            if (k == 0 && uncovered != nullptr) {
                uint64_t bare = 0;
                for (int64_t x = span.begin; x < span.end; ++x)
                    bare += load_one<float>(weights + x * weight_stride[2]) == 0.0f ? 1 : 0;
                if (bare != 0) add_to(uncovered, bare);
            }
        }
    }
};

template <Op op>
void finish_blend(const BlendFinish& call, uint64_t* uncovered, Stream stream) {
    const Array& t = call.total;
    const Array& o = call.out;
    const int64_t step = apart(op) ? kBounds : t.shape[0];
    const int64_t strides[] = {moving(o, 0), moving(o, 1), moving(o, 2)};
    for (int64_t k = 0; k < t.shape[0]; k += step) {
        const int64_t channels = std::min(step, t.shape[0] - k);
        Finishing<op> body{};
        body.total = t.data + k * t.stride[0];
        body.weight = call.weight_total.data;
        body.out = o.data + k * o.stride[0];
        for (int axis = 0; axis < 4; ++axis) body.total_stride[axis] = t.stride[axis];
        for (int axis = 0; axis < 3; ++axis) body.weight_stride[axis] = call.weight_total.stride[axis];
        for (int axis = 0; axis < 4; ++axis) body.out_stride[axis] = o.stride[axis];
        const int64_t vector = vector_of<op>(o, body.kVector);
        body.rows = rows_of(t.shape[2], t.shape[3], body.out, o.stride[3], strides, sizeof(Result<op>), vector, vector);
        body.depth = Divider(t.shape[1]);
        body.planes = static_cast<uint32_t>(t.shape[1] * (apart(op) ? channels : 1));
        body.uncovered = k == 0 ? uncovered : nullptr;
        set_results(body, op, channels, o, call.threshold + (op == Op::threshold ? k : 0), call.values);
        launch({blocks_for(body.rows.items), body.planes, 1}, stream, body);
    }
}

}  // namespace stitch_kernel

void tile_stitch(const TileStitch& call, const DeviceTable& source_start, const DeviceTable& target_start,
                 const DeviceTable& size, Stream stream) {
    using namespace stitch_kernel;
    for (const int64_t extent : call.tiles.shape)
        if (extent == 0) return;
    for (int axis = 0; axis < 4; ++axis)
        if (call.out.shape[axis] == 0) return;
    const DeviceParts device{source_start, target_start, size};
    const bool narrow = call.tiles.dtype == DType::f16;
    switch (call.op) {
        case Op::copy:
            return narrow ? place<half, Op::copy>(call, device, stream) : place<float, Op::copy>(call, device, stream);
        case Op::softmax:
            return narrow ? place<half, Op::softmax>(call, device, stream)
                          : place<float, Op::softmax>(call, device, stream);
        case Op::sigmoid:
            return narrow ? place<half, Op::sigmoid>(call, device, stream)
                          : place<float, Op::sigmoid>(call, device, stream);
        case Op::argmax:
            return narrow ? place<half, Op::argmax>(call, device, stream)
                          : place<float, Op::argmax>(call, device, stream);
        case Op::threshold:
            return narrow ? place<half, Op::threshold>(call, device, stream)
                          : place<float, Op::threshold>(call, device, stream);
    }
}

void tile_blend(const TileBlend& call, const DeviceTable& source_start, const DeviceTable& target_start,
                const DeviceTable& size, Stream stream) {
    for (const int64_t extent : call.tiles.shape)
        if (extent == 0) return;
    const stitch_kernel::DeviceParts device{source_start, target_start, size};
    const bool narrow = call.tiles.dtype == DType::f16;
    if (device.size.data != nullptr)
        return narrow ? stitch_kernel::blend<half, stitch_kernel::Parts>(call, device, stream)
                      : stitch_kernel::blend<float, stitch_kernel::Parts>(call, device, stream);
    narrow ? stitch_kernel::blend<half, stitch_kernel::Listed>(call, device, stream)
           : stitch_kernel::blend<float, stitch_kernel::Listed>(call, device, stream);
}

void blend_finish(const BlendFinish& call, uint64_t* uncovered, Stream stream) {
    using namespace stitch_kernel;
    for (int axis = 0; axis < 4; ++axis)
        if (call.total.shape[axis] == 0) return;
    switch (call.op) {
        case Op::copy:
            return finish_blend<Op::copy>(call, uncovered, stream);
        case Op::softmax:
            return finish_blend<Op::softmax>(call, uncovered, stream);
        case Op::sigmoid:
            return finish_blend<Op::sigmoid>(call, uncovered, stream);
        case Op::argmax:
            return finish_blend<Op::argmax>(call, uncovered, stream);
        case Op::threshold:
            return finish_blend<Op::threshold>(call, uncovered, stream);
    }
}

}  // namespace unet_rt::cuda
