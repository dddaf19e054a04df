#include "c_calls.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>

#include "c_checks.h"

namespace unet_rt::c {
namespace {

// Normal float32 numbers.
constexpr double kSmallest = 1.1754943508222875e-38;
constexpr double kLargest = 3.4028234663852886e38;
constexpr int64_t kMostClasses = 256;

template <class Call>
void require_call(const Call* call, const char* name) {
    if (call == nullptr) refuse(UNET_RT_BAD_CALL, std::string("no ") + name + " was given");
    if (call->size != sizeof(Call))
        refuse(UNET_RT_BAD_CALL, std::string(name) + " says a size of " + std::to_string(call->size) +
                                     ", this library knows one of " + std::to_string(sizeof(Call)) +
                                     "; set .size = sizeof it, and build against the header of this library");
}

void require_dtype(const char* name, const Array& array, std::initializer_list<DType> allowed, const char* text) {
    if (std::find(allowed.begin(), allowed.end(), array.dtype) == allowed.end())
        refuse(UNET_RT_BAD_DTYPE, std::string(name) + " has dtype " + std::to_string(static_cast<int>(array.dtype)) +
                                      "; it is to be " + text);
}

template <class T>
const T* aligned(const char* name, const T* table) {
    if (table == nullptr) refuse(UNET_RT_BAD_CALL, std::string(name) + " is null");
    if (reinterpret_cast<uintptr_t>(table) % alignof(T) != 0)
        refuse(UNET_RT_BAD_CALL, std::string(name) + " is misaligned: it is not the address of an array of its type");
    return table;
}

std::string row_text(const int64_t* row, int axes) {
    std::string text = "[";
    for (int axis = 0; axis < axes; ++axis) text += (axis > 0 ? ", " : "") + std::to_string(row[axis + 3 - axes]);
    return text + "]";
}

// (count, axes) on the host as (count, 3), the missing first axes filled. Copied: what is checked is what is used.
Table table_of(const char* name, const int64_t* table, int64_t count, int axes, int64_t missing, bool on_device) {
    Table result;
    result.axes = axes;
    if (count == 0) return result;
    aligned(name, table);
    if (on_device) {
        result.device = table;
        return result;
    }
    result.rows.assign(static_cast<size_t>(3 * count), missing);
    for (int64_t row = 0; row < count; ++row)
        for (int axis = 0; axis < axes; ++axis)
            result.rows[static_cast<size_t>(3 * row + 3 - axes + axis)] = table[row * axes + axis];
    return result;
}

// (axes,) of a call as three numbers; `missing` where there is none.
void three(const char* name, const int64_t* sizes, int axes, int64_t missing, int64_t* result) {
    aligned(name, sizes);
    for (int axis = 0; axis < 3; ++axis) result[axis] = axis < 3 - axes ? missing : sizes[axis - (3 - axes)];
    for (int axis = 0; axis < 3; ++axis)
        if (result[axis] < -kFarthest || result[axis] > kFarthest)
            refuse(UNET_RT_BAD_SHAPE, std::string(name) + " holds " + std::to_string(result[axis]) + "; within 2^48");
}

std::vector<double> numbers_of(const double* numbers, int64_t channels, double missing) {
    if (numbers == nullptr) return std::vector<double>(static_cast<size_t>(channels), missing);
    aligned("a normalisation's table", numbers);
    return {numbers, numbers + channels};
}

[[noreturn]] void refuse_gap(const TileGather& call, const GatherGap& gap, int spatial) {
    const int64_t first = call.window_start[gap.axis];
    const int64_t last = first + call.window.shape[1 + gap.axis] - 1;
    refuse(UNET_RT_BAD_PLACE, "tile " + std::to_string(gap.tile) + " needs image pixels " + std::to_string(gap.first) +
                                  " to " + std::to_string(gap.last) + " along spatial axis " +
                                  std::to_string(gap.axis - (3 - spatial)) + ", but the window holds " +
                                  std::to_string(first) + " to " + std::to_string(last) +
                                  "; read a window that covers the tile, mirrored border pixels included");
}

void check_frame(const unet_rt_gather_call& call, TileGather& to, int axes) {
    const int64_t* const held = to.window.shape + 1;
    if (elements_of(to.window) == 0)
        refuse(UNET_RT_BAD_SHAPE, "window is " + shape_text(call.window) + " and holds no pixel to gather from");
    std::copy(held, held + 3, to.image_shape);
    if (call.image_shape != nullptr) three("image_shape", call.image_shape, axes, 1, to.image_shape);
    if (call.window_start != nullptr) three("window_start", call.window_start, axes, 0, to.window_start);
    for (int axis = 0; axis < 3; ++axis)
        if (to.window_start[axis] < 0 || to.window_start[axis] > to.image_shape[axis] - held[axis])
            refuse(UNET_RT_BAD_SHAPE, "the window of " + row_text(held, axes) + " px at " +
                                          row_text(to.window_start, axes) + " is not inside the image of " +
                                          row_text(to.image_shape, axes) + " px; the border rule adds the rest");
    if (call.border < UNET_RT_MIRROR || call.border > UNET_RT_CONSTANT)
        refuse(UNET_RT_BAD_CALL, "border is " + std::to_string(call.border) + "; give one of unet_rt_border");
    to.border = static_cast<Border>(call.border);
    to.constant = call.constant;
}

void check_affine(const Gather& gather, int64_t channels) {
    for (size_t c = 0; c < static_cast<size_t>(channels); ++c) {
        const double offset = gather.offset[c], divisor = std::abs(gather.divisor[c]);
        if (!(std::abs(offset) <= kLargest) || !(divisor >= kSmallest && divisor <= kLargest))
            refuse(UNET_RT_BAD_NUMBER,
                   "offset " + std::to_string(offset) + " and divisor " + std::to_string(gather.divisor[c]) +
                       " do not normalise; give float32 numbers, the divisor neither 0 nor subnormal");
        if (!(gather.low[c] <= gather.high[c]))
            refuse(UNET_RT_BAD_NUMBER, "the clip's lower bound " + std::to_string(gather.low[c]) +
                                           " is above its upper bound " + std::to_string(gather.high[c]));
    }
}

void check_coordinates(const char* name, const Table& table) {
    for (const int64_t value : table.rows)
        if (value < -kFarthest || value > kFarthest)
            refuse(UNET_RT_BAD_PLACE,
                   std::string(name) + " holds " + std::to_string(value) + "; it must stay within 2^48");
}

void check_inside(const char* name, const Table& start, const Table& extent, const int64_t* whole, int axes) {
    for (size_t i = 0; i < start.rows.size(); ++i) {
        const int64_t from = start.rows[i], count = extent.rows[i];
        if (from >= 0 && count >= 0 && count <= whole[i % 3] && from <= whole[i % 3] - count) continue;
        const size_t row = i / 3 * 3;
        refuse(UNET_RT_BAD_PLACE, "tile " + std::to_string(i / 3) + ": " + row_text(extent.rows.data() + row, axes) +
                                      " samples at " + row_text(start.rows.data() + row, axes) + " leave the " + name +
                                      " of " + row_text(whole, axes) + "; parts must lie inside");
    }
}

// Two parts at one place would be written by two threads. They are compared with those that begin before they end.
void check_apart(const Table& target, const Table& extent) {
    const int64_t* const from = target.rows.data();
    const int64_t* const size = extent.rows.data();
    const size_t count = target.rows.size() / 3;
    if (count < 2) return;
    size_t axis = 0;  // along which parts spread furthest: fewest begin before one ends
    for (size_t k = 0, widest = 0; k < 3; ++k) {
        int64_t low = from[k], high = from[k];
        for (size_t n = 1; n < count; ++n) low = std::min(low, from[3 * n + k]), high = std::max(high, from[3 * n + k]);
        if (static_cast<size_t>(high - low) > widest) widest = static_cast<size_t>(high - low), axis = k;
    }
    std::vector<size_t> order;
    for (size_t n = 0; n < count; ++n)
        if (size[3 * n] > 0 && size[3 * n + 1] > 0 && size[3 * n + 2] > 0) order.push_back(n);
    const auto before = [&](size_t a, size_t b) { return from[3 * a + axis] < from[3 * b + axis]; };
    if (!std::is_sorted(order.begin(), order.end(), before)) std::sort(order.begin(), order.end(), before);
    for (size_t i = 0; i < order.size(); ++i) {
        const int64_t* const a = from + 3 * order[i];
        const int64_t* const extent_a = size + 3 * order[i];
        for (size_t j = i + 1; j < order.size(); ++j) {
            const int64_t* const b = from + 3 * order[j];
            const int64_t* const extent_b = size + 3 * order[j];
            if (b[axis] >= a[axis] + extent_a[axis]) break;
            bool shared = true;
            for (int k = 0; k < 3; ++k) shared = shared && b[k] < a[k] + extent_a[k] && a[k] < b[k] + extent_b[k];
            if (shared)
                refuse(UNET_RT_OVERLAP, "the parts of tiles " + std::to_string(std::min(order[i], order[j])) + " and " +
                                            std::to_string(std::max(order[i], order[j])) +
                                            " share places of the output; cut them, or blend them");
        }
    }
}

// The three tables of a placement, checked where they lie on the host.
struct Placement {
    Table& source;
    Table& target;
    Table& extent;
    int64_t count;
    int axes;
    bool on_device;

    template <class Call>
    void read(const Call& call) const {
        source = table_of("source_start", call.source_start, count, axes, 0, on_device);
        target = table_of("target_start", call.target_start, count, axes, 0, on_device);
        extent = table_of("extent", call.extent, count, axes, 1, on_device);
    }
    void check(const int64_t* tile, const int64_t* whole) const {
        check_inside("tile", source, extent, tile, axes);
        check_inside("output", target, extent, whole, axes);
    }
};

Array tiles_view(const unet_rt_array& tiles) {
    const Array view = view_of("tiles", tiles, 2);
    require_dtype("tiles", view, {DType::f32, DType::f16}, "float32 or float16");
    if (view.shape[1] < 1) refuse(UNET_RT_BAD_SHAPE, "tiles are " + shape_text(tiles) + ", without a channel");
    return view;
}

Op op_of(int32_t op) {
    if (op < UNET_RT_COPY || op > UNET_RT_THRESHOLD)
        refuse(UNET_RT_BAD_CALL, "op is " + std::to_string(op) + "; give one of unet_rt_op");
    return static_cast<Op>(op);
}

// The output of an operation over `channels` channels and `axes` spatial axes, with a channel axis in any case.
Array result_view(const unet_rt_array& out, Op op, int64_t channels, int axes) {
    const int lead = op == Op::argmax ? 0 : 1;
    Array view = view_of("out", out, lead);
    if (op == Op::argmax || op == Op::threshold)
        require_dtype("out", view, {DType::u8}, "uint8");
    else
        require_dtype("out", view, {DType::f32}, "float32");
    if (out.axes - lead != axes || (lead == 1 && out.shape[0] != channels))
        refuse(UNET_RT_BAD_SHAPE, "out is " + shape_text(out) + "; the operation on " + std::to_string(channels) +
                                      " channels and " + std::to_string(axes) + " spatial axes needs " +
                                      (lead == 0 ? "(*spatial)" : "(K, *spatial)"));
    if (op == Op::argmax) {
        for (int axis = 3; axis > 0; --axis) {
            view.shape[axis] = view.shape[axis - 1];
            view.stride[axis] = view.stride[axis - 1];
        }
        view.shape[0] = 1;
        view.stride[0] = 0;
    }
    require_distinct("out", view);
    return view;
}

const float* bounds_of(const float* threshold, Op op) {
    return op == Op::threshold ? aligned("threshold", threshold) : nullptr;
}

// The values of classes, or below and above a threshold, at `values`.
const uint8_t* values_of(const uint8_t* given, Op op, int64_t channels, uint8_t* values) {
    if (op == Op::argmax && channels > kMostClasses)
        refuse(UNET_RT_BAD_NUMBER, "argmax over " + std::to_string(channels) + " channels does not fit uint8");
    const int64_t count = op == Op::argmax ? channels : op == Op::threshold ? 2 : 0;
    for (int64_t k = 0; k < count; ++k) values[k] = given == nullptr ? static_cast<uint8_t>(k) : given[k];
    return values;
}

}  // namespace

Gather::Gather(const unet_rt_gather_call* asked) {
    require_call(asked, "unet_rt_gather_call");
    call.window = view_of("window", asked->window, 1);
    call.out = view_of("out", asked->out, 2);
    require_dtype("out", call.out, {DType::f32, DType::f16}, "float32 or float16");
    const int axes = asked->window.axes - 1;
    const int64_t channels = call.window.shape[0];
    if (asked->out.axes != axes + 2 || call.out.shape[1] != channels)
        refuse(UNET_RT_BAD_SHAPE, "out is " + shape_text(asked->out) + " for a window of " + shape_text(asked->window) +
                                      "; it is to be (N, C, *tile) for (C, *spatial)");
    require_distinct("out", call.out);
    require_apart("out", call.out, "window", call.window);
    check_frame(*asked, call, axes);
    starts = table_of("starts", asked->starts, call.out.shape[0], axes, 0, asked->tables_on_device != 0);
    check_coordinates("starts", starts);
    if ((asked->offset == nullptr) != (asked->divisor == nullptr) ||
        (asked->low == nullptr) != (asked->high == nullptr))
        refuse(UNET_RT_BAD_CALL, "offset and divisor belong together, and so do low and high");
    if (asked->offset == nullptr && asked->low != nullptr)
        refuse(UNET_RT_BAD_CALL, "low and high without offset and divisor; give 0 and 1 for these");
    call.affine = asked->offset != nullptr;
    offset = numbers_of(asked->offset, channels, 0);
    divisor = numbers_of(asked->divisor, channels, 1);
    low = numbers_of(asked->low, channels, -INFINITY);
    high = numbers_of(asked->high, channels, INFINITY);
    check_affine(*this, channels);
    call.starts = starts.rows.data();
    call.offset = offset.data();
    call.divisor = divisor.data();
    call.low = low.data();
    call.high = high.data();
    empty = elements_of(call.out) == 0;
    if (empty || starts.device != nullptr) return;
    if (const GatherGap gap = find_gap(call); gap.found) refuse_gap(call, gap, axes);
}

Stitch::Stitch(const unet_rt_stitch_call* asked) {
    require_call(asked, "unet_rt_stitch_call");
    call.tiles = tiles_view(asked->tiles);
    const int axes = asked->tiles.axes - 2;
    const int64_t channels = call.tiles.shape[1];
    call.op = op_of(asked->op);
    call.out = result_view(asked->out, call.op, channels, axes);
    require_apart("out", call.out, "tiles", call.tiles);
    const Placement placement{source, target, extent, call.tiles.shape[0], axes, asked->tables_on_device != 0};
    placement.read(*asked);
    placement.check(call.tiles.shape + 2, call.out.shape + 1);
    check_apart(target, extent);
    call.source_start = source.rows.data();
    call.target_start = target.rows.data();
    call.size = extent.rows.data();
    call.threshold = bounds_of(asked->threshold, call.op);
    call.values = values_of(asked->values, call.op, channels, values);
}

Blend::Blend(const unet_rt_blend_call* asked) {
    require_call(asked, "unet_rt_blend_call");
    call.tiles = tiles_view(asked->tiles);
    const int axes = asked->tiles.axes - 2;
    call.weight = view_of("weight", asked->weight, 0);
    call.total = view_of("total", asked->total, 1);
    call.weight_total = view_of("weight_total", asked->weight_total, 0);
    require_dtype("weight", call.weight, {DType::f32}, "float32");
    require_dtype("total", call.total, {DType::f32}, "float32");
    require_dtype("weight_total", call.weight_total, {DType::f32}, "float32");
    if (asked->weight.axes != axes || !std::equal(call.weight.shape, call.weight.shape + 3, call.tiles.shape + 2))
        refuse(UNET_RT_BAD_SHAPE, "weight is " + shape_text(asked->weight) + ", tiles are " + shape_text(asked->tiles) +
                                      "; a weight has the tile's spatial shape");
    if (asked->total.axes != axes + 1 || asked->weight_total.axes != axes ||
        call.total.shape[0] != call.tiles.shape[1] ||
        !std::equal(call.weight_total.shape, call.weight_total.shape + 3, call.total.shape + 1))
        refuse(UNET_RT_BAD_SHAPE, "total is " + shape_text(asked->total) + " and weight_total " +
                                      shape_text(asked->weight_total) + "; tiles of " + shape_text(asked->tiles) +
                                      " need (K, *spatial) and (*spatial)");
    require_distinct("total", call.total);
    require_distinct("weight_total", call.weight_total);
    require_apart("total", call.total, "weight_total", call.weight_total);
    require_apart("total", call.total, "tiles", call.tiles);
    require_apart("total", call.total, "weight", call.weight);
    require_apart("weight_total", call.weight_total, "tiles", call.tiles);
    require_apart("weight_total", call.weight_total, "weight", call.weight);
    const Placement placement{source, target, extent, call.tiles.shape[0], axes, asked->tables_on_device != 0};
    placement.read(*asked);
    placement.check(call.tiles.shape + 2, call.weight_total.shape);
    call.source_start = source.rows.data();
    call.target_start = target.rows.data();
    call.size = extent.rows.data();
}

Finish::Finish(const unet_rt_finish_call* asked) {
    require_call(asked, "unet_rt_finish_call");
    call.total = view_of("total", asked->total, 1);
    call.weight_total = view_of("weight_total", asked->weight_total, 0);
    require_dtype("total", call.total, {DType::f32}, "float32");
    require_dtype("weight_total", call.weight_total, {DType::f32}, "float32");
    const int axes = asked->total.axes - 1;
    const int64_t channels = call.total.shape[0];
    if (channels < 1 || asked->weight_total.axes != axes ||
        !std::equal(call.weight_total.shape, call.weight_total.shape + 3, call.total.shape + 1))
        refuse(UNET_RT_BAD_SHAPE, "total is " + shape_text(asked->total) + " and weight_total " +
                                      shape_text(asked->weight_total) + "; spatial shapes must agree");
    call.op = op_of(asked->op);
    call.out = result_view(asked->out, call.op, channels, axes);
    if (!std::equal(call.out.shape + 1, call.out.shape + 4, call.total.shape + 1))
        refuse(UNET_RT_BAD_SHAPE, "out is " + shape_text(asked->out) + " for a total of " + shape_text(asked->total) +
                                      "; spatial shapes must agree");
    require_apart("out", call.out, "total", call.total);
    require_apart("out", call.out, "weight_total", call.weight_total);
    call.threshold = bounds_of(asked->threshold, call.op);
    call.values = values_of(asked->values, call.op, channels, values);
}

CropConcat concat_of(const unet_rt_concat_call* asked) {
    require_call(asked, "unet_rt_concat_call");
    CropConcat call{};
    call.skip = view_of("skip", asked->skip, 2);
    call.up = view_of("up", asked->up, 2);
    call.out = view_of("out", asked->out, 2);
    require_dtype("skip", call.skip, {DType::f32, DType::f16, DType::i8, DType::u8}, "float32, float16, int8 or uint8");
    if (call.up.dtype != call.skip.dtype || call.out.dtype != call.skip.dtype)
        refuse(UNET_RT_BAD_DTYPE, "skip, up and out have different dtypes; give all three the same");
    const int axes = asked->up.axes - 2;
    const int64_t *skip = call.skip.shape, *up = call.up.shape, *out = call.out.shape;
    if (asked->skip.axes != asked->up.axes || asked->out.axes != asked->up.axes || skip[0] != up[0] ||
        out[0] != up[0] || out[1] != skip[1] + up[1] || !std::equal(out + 2, out + 5, up + 2))
        refuse(UNET_RT_BAD_SHAPE, "skip " + shape_text(asked->skip) + " and up " + shape_text(asked->up) +
                                      " do not concatenate into out " + shape_text(asked->out));
    for (int axis = 0; axis < 3; ++axis) {
        const int64_t room = skip[2 + axis] - up[2 + axis];
        if (room < 0)
            refuse(UNET_RT_BAD_SHAPE,
                   "skip " + shape_text(asked->skip) + " is smaller than up " + shape_text(asked->up));
        call.offset[axis] = centre_offset(skip[2 + axis], up[2 + axis]);
    }
    if (asked->offset != nullptr) three("offset", asked->offset, axes, 0, call.offset);
    for (int axis = 0; axis < 3; ++axis)
        if (call.offset[axis] < 0 || call.offset[axis] > skip[2 + axis] - up[2 + axis])
            refuse(UNET_RT_BAD_PLACE,
                   "offset " + row_text(call.offset, axes) + " leaves skip " + shape_text(asked->skip));
    require_distinct("out", call.out);
    require_apart("out", call.out, "skip", call.skip);
    require_apart("out", call.out, "up", call.up);
    return call;
}

Histogram histogram_of(const unet_rt_histogram_call* asked) {
    require_call(asked, "unet_rt_histogram_call");
    const unet_rt_array& values = asked->values;
    if (values.dtype != UNET_RT_U8 && values.dtype != UNET_RT_U16)
        refuse(UNET_RT_BAD_DTYPE,
               "values have dtype " + std::to_string(values.dtype) + "; they are to be uint8 or uint16");
    const int bytes = values.dtype == UNET_RT_U8 ? 1 : 2;
    if (values.axes < 0 || values.axes > kMaxAxes)
        refuse(UNET_RT_BAD_SHAPE, "values have " + std::to_string(values.axes) + " axes; 0 to 5 are taken");
    int64_t dense = bytes, count = 1;
    for (int axis = values.axes - 1; axis >= 0; --axis) {
        const int64_t size = values.shape[axis];
        if (size < 0 || size > kFarthest || (size > 0 && count > (int64_t{1} << 60) / size))
            refuse(UNET_RT_BAD_SHAPE, "values are " + shape_text(values) + ": more than can be addressed");
        if (size > 1 && values.stride[axis] != dense && count > 0)
            refuse(UNET_RT_BAD_SHAPE, "values are not in C order; copy them so");
        count *= size;
        dense *= size;
    }
    aligned("counts", asked->counts);
    if (count > 0 && values.data == nullptr) refuse(UNET_RT_BAD_CALL, "values are at a null pointer");
    const auto from = reinterpret_cast<uintptr_t>(values.data), to = reinterpret_cast<uintptr_t>(asked->counts);
    const uint64_t held = static_cast<uint64_t>(count * bytes), counted = uint64_t{8} << (8 * bytes);
    if (count > 0 && (held > UINTPTR_MAX - from || (from < to + counted && to < from + held)))
        refuse(UNET_RT_OVERLAP, "counts share memory with the values; pass memory of their own");
    return {values.data, count, bytes, asked->counts};
}

void require_host(int32_t tables_on_device) {
    if (tables_on_device != 0) refuse(UNET_RT_BAD_CALL, "tables_on_device is set for arrays on the host; leave it 0");
}

int threads_of(int32_t threads) {
    if (threads < 0)
        refuse(UNET_RT_BAD_CALL, "threads is " + std::to_string(threads) + "; give 0 for all, or a positive number");
    return threads > 0 ? threads : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int32_t report(int32_t code, const char* text, unet_rt_error* error) noexcept {
    if (error == nullptr) return code;
    error->code = code;
    const size_t length = std::min(strlen(text), sizeof error->text - 1);
    memcpy(error->text, text, length);
    error->text[length] = '\0';
    return code;
}

}  // namespace unet_rt::c
