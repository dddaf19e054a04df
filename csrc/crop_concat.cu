// CUDA kernel. Skip and up are two boxes to copy, whose axes are put in the order of the output's memory and united
// where both arrays allow it: planar and channels-last arrays end as long rows, of which a thread copies 16 bytes.
#include <utility>

#include "kernels_cuda.h"

namespace unet_rt::cuda {
namespace concat_kernel {

// Axes from the outermost to the innermost; a row is the last.
struct Box {
    const char* from;
    char* to;
    int64_t from_stride[5];
    int64_t to_stride[5];
    Divider second, third;  // sizes of the axes 1 and 2
    Rows rows;              // along the axes 3 and 4
    uint32_t planes;        // of the axes 0 to 2
    Divider plane;          // vectors of a plane
    uint32_t first;         // plane of the launch
    uint32_t items;         // vectors of the launch
};

constexpr int64_t kMostItems = INT32_MAX;
constexpr uint32_t kEach = 4;  // vectors per thread: their loads are under way together

// T: an unsigned integer of the elements' size. Vectors are counted through all planes of a box, and blocks through
// both boxes, so that none is launched in vain.
template <class T>
struct Body {
    static constexpr int kBytes = sizeof(T);
    static constexpr int kBlocks = 4;
    Box boxes[2];
    uint32_t turn;  // first block of the second box

    // Where a vector comes from and goes to.
    struct Vector {
        const char* from;
        char* to;
        Rows::Span span;
    };

    UNET_RT_HD void operator()(const Place& at) const {
        const bool second = at.block_x >= turn;
        const Box& box = boxes[second ? 1 : 0];
        const uint32_t first = (at.block_x - (second ? turn : 0)) * (kThreads * kEach) + at.thread;
        const bool adjacent = box.from_stride[4] == kBytes;
        const char* from[kEach];
        char* to[kEach];
        bool whole[kEach];
        bool all = true;
        uint64_t misaligned = 0;
        UNET_RT_UNROLL
        for (uint32_t i = 0; i < kEach; ++i) {
            const uint32_t item = first + i * kThreads;
            const bool there = item < box.items;
            const Vector vector = place(box, there ? item : 0);
            whole[i] = there && adjacent && vector.span.whole;
            all = all && (whole[i] || !there);
            from[i] = vector.from + vector.span.x * kBytes;
            to[i] = vector.to + vector.span.x * kBytes;
            misaligned |= whole[i] ? address_of(from[i]) : 0;
        }
        uint32_t words[kEach][4];
        if (misaligned % 16 == 0) {
            UNET_RT_UNROLL
            for (uint32_t i = 0; i < kEach; ++i)
                if (whole[i]) load_aligned<4>(from[i], words[i]);
        } else {
            UNET_RT_UNROLL
            for (uint32_t i = 0; i < kEach; ++i)
                if (whole[i]) load_shifted<4>(from[i], words[i]);
        }
        UNET_RT_UNROLL
        for (uint32_t i = 0; i < kEach; ++i)
            if (whole[i]) store_aligned<16>(to[i], words[i]);
        if (all) return;
        UNET_RT_ROLLED
        for (uint32_t item = first; item < box.items && item - first < kThreads * kEach; item += kThreads) {
            const Vector vector = place(box, item);
            if (!adjacent || !vector.span.whole) one_by_one(box, vector);
        }
    }

    static UNET_RT_HD Vector place(const Box& box, uint32_t item) {
        const uint32_t plane = box.plane.quotient(item);
        const uint32_t own = item - plane * box.plane.divisor;
        const uint32_t y = box.rows.vectors.quotient(own);
        const uint32_t whole = box.first + plane;
        const uint32_t lines = box.third.quotient(whole);
        const uint32_t c = whole - lines * box.third.divisor;
        const uint32_t a = box.second.quotient(lines);
        const uint32_t b = lines - a * box.second.divisor;
        char* const to =
            box.to + a * box.to_stride[0] + b * box.to_stride[1] + c * box.to_stride[2] + y * box.to_stride[3];
        const char* const from = box.from + a * box.from_stride[0] + b * box.from_stride[1] + c * box.from_stride[2] +
                                 y * box.from_stride[3];
        return {from, to, box.rows.span(own, y, to, kBytes, box.rows.width)};
    }

    static UNET_RT_HD void one_by_one(const Box& box, const Vector& v) {
        constexpr int kCount = 16 / kBytes;
        T elements[kCount] = {};
        UNET_RT_UNROLL
        for (int i = 0; i < kCount; ++i) {
            const int64_t x = v.span.x + i;
            if (x >= v.span.begin && x < v.span.end) elements[i] = load_one<T>(v.from + x * box.from_stride[4]);
        }
        UNET_RT_UNROLL
        for (int i = 0; i < kCount; ++i) {
            const int64_t x = v.span.x + i;
            if (x >= v.span.begin && x < v.span.end) store_one(v.to + x * box.to_stride[4], elements[i]);
        }
    }
};

// The box of `shape` samples: the first of `from`, `start` bytes on, to the place `to` in the output.
Box box_of(const Array& from, int64_t start, char* to, const Array& out, int64_t channels, int64_t bytes) {
    struct Axis {
        int64_t size, from, to;
    };
    Axis axes[kMaxAxes];
    int count = 0;
    for (int axis = 0; axis < kMaxAxes; ++axis) {
        const int64_t size = axis == 1 ? channels : out.shape[axis];
        if (size != 1) axes[count++] = {size, from.stride[axis], out.stride[axis]};
    }
    // The smallest stride of the output last; strides of the same size keep their order.
    const auto magnitude = [](int64_t stride) { return stride < 0 ? -stride : stride; };
    for (int i = 1; i < count; ++i)
        for (int j = i; j > 0 && magnitude(axes[j - 1].to) < magnitude(axes[j].to); --j)
            std::swap(axes[j - 1], axes[j]);
    for (int i = count - 2; i >= 0; --i) {
        Axis& outer = axes[i];
        const Axis& inner = axes[i + 1];
        if (outer.from != inner.from * inner.size || outer.to != inner.to * inner.size) continue;
        if (outer.size * inner.size > INT32_MAX) continue;
        outer = {outer.size * inner.size, inner.from, inner.to};
        for (int j = i + 1; j + 1 < count; ++j) axes[j] = axes[j + 1];
        --count;
    }
    Box box{};
    box.from = from.data + start;
    box.to = to;
    int64_t shape[5] = {1, 1, 1, 1, 1};
    for (int i = 0; i < count; ++i) {
        const int place = 5 - count + i;
        shape[place] = axes[i].size;
        box.from_stride[place] = axes[i].from;
        box.to_stride[place] = axes[i].to;
    }
    const int64_t planes = shape[0] * shape[1] * shape[2];
    if (planes > INT32_MAX) throw std::length_error("more than 2^31 rows, columns or planes in one array");
    box.planes = static_cast<uint32_t>(planes);
    box.second = Divider(shape[1]);
    box.third = Divider(shape[2]);
    const int64_t strides[] = {box.to_stride[0], box.to_stride[1], box.to_stride[2], box.to_stride[3]};
    box.rows = rows_of(shape[3], shape[4], to, box.to_stride[4], strides, bytes, 16 / bytes, 16 / bytes);
    box.plane = Divider(box.rows.items);
    return box;
}

template <class T>
void run(const CropConcat& call, Stream stream) {
    const Array& o = call.out;
    Body<T> body{};
    const int64_t parts[] = {call.skip.shape[1], call.up.shape[1]};
    int64_t start = 0;
    for (int axis = 0; axis < 3; ++axis) start += call.offset[axis] * call.skip.stride[2 + axis];
    int used = 0;
    if (parts[0] > 0) body.boxes[used++] = box_of(call.skip, start, o.data, o, parts[0], sizeof(T));
    if (parts[1] > 0) body.boxes[used++] = box_of(call.up, 0, o.data + parts[0] * o.stride[1], o, parts[1], sizeof(T));
    // Planes go into one launch as long as their vectors can be counted.
    for (int64_t done[2] = {0, 0};;) {
        int64_t blocks[2] = {0, 0};
        for (int i = 0; i < used; ++i) {
            Box& box = body.boxes[i];
            const int64_t planes = std::min(box.planes - done[i], kMostItems / box.rows.items);
            box.first = static_cast<uint32_t>(done[i]);
            box.items = static_cast<uint32_t>(planes * box.rows.items);
            done[i] += planes;
            blocks[i] = (box.items + kThreads * kEach - 1) / (kThreads * kEach);
        }
        if (blocks[0] + blocks[1] == 0) return;
        body.turn = static_cast<uint32_t>(blocks[0]);
        launch({blocks[0] + blocks[1], 1, 1}, stream, body);
    }
}

// Makes elements of twice as many bytes, if an axis of adjacent elements divides into them: the last one, or the
// channels where those are adjacent. Whether it does.
bool pairs(CropConcat& call, int64_t bytes) {
    Array* const arrays[] = {&call.skip, &call.up, &call.out};
    for (const int axis : {4, 1}) {
        bool possible = true;
        for (const Array* array : arrays) {
            if (array->shape[axis] == 0) continue;  // a part without channels
            uint64_t ragged = address_of(array->data) | static_cast<uint64_t>(array->shape[axis] * bytes);
            for (int other = 0; other < kMaxAxes; ++other)
                if (other != axis && array->shape[other] > 1) ragged |= static_cast<uint64_t>(array->stride[other]);
            possible = possible && array->stride[axis] == bytes && ragged % static_cast<uint64_t>(2 * bytes) == 0;
        }
        if (axis == 4) possible = possible && call.offset[2] % 2 == 0;
        if (!possible) continue;
        for (Array* array : arrays) array->shape[axis] /= 2, array->stride[axis] *= 2;
        if (axis == 4) call.offset[2] /= 2;
        return true;
    }
    return false;
}

}  // namespace concat_kernel

void crop_concat(const CropConcat& call, Stream stream) {
    for (const int64_t size : call.out.shape)
        if (size == 0) return;
    // As few elements as possible: adjacent ones are copied as one where rows consist of them.
    CropConcat wide = call;
    int64_t bytes = item_bytes(call.out.dtype);
    while (bytes < 4 && concat_kernel::pairs(wide, bytes)) bytes *= 2;
    if (bytes == 1) return concat_kernel::run<uint8_t>(wide, stream);
    if (bytes == 2) return concat_kernel::run<uint16_t>(wide, stream);
    return concat_kernel::run<uint32_t>(wide, stream);
}

}  // namespace unet_rt::cuda
