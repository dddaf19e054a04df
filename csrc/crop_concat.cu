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
};

// T: an unsigned integer of the elements' size.
template <class T>
struct Body {
    static constexpr int kBytes = sizeof(T);
    static constexpr int kBlocks = 4;
    Box boxes[2];

    UNET_RT_HD void operator()(const Place& at) const {
        const Box& box = boxes[at.block_z];
        const uint32_t item = at.block_x * kThreads + at.thread;
        if (item >= box.rows.items) return;
        const uint32_t y = box.rows.vectors.quotient(item);
        for (uint32_t plane = at.block_y; plane < box.planes; plane += at.blocks_y) {
            const uint32_t lines = box.third.quotient(plane);
            const uint32_t c = plane - lines * box.third.divisor;
            const uint32_t a = box.second.quotient(lines);
            const uint32_t b = lines - a * box.second.divisor;
            char* const to =
                box.to + a * box.to_stride[0] + b * box.to_stride[1] + c * box.to_stride[2] + y * box.to_stride[3];
            const char* const from = box.from + a * box.from_stride[0] + b * box.from_stride[1] +
                                     c * box.from_stride[2] + y * box.from_stride[3];
            const auto span = box.rows.span(item, y, to, kBytes, box.rows.width);
            if (span.whole) {
                T elements[16 / kBytes];
                load_many(from + span.x * box.from_stride[4], box.from_stride[4], elements);
                store_aligned<16>(to + span.x * kBytes, elements);
            } else {
                for (int64_t x = span.begin; x < span.end; ++x)
                    store_one(to + x * box.to_stride[4], load_one<T>(from + x * box.from_stride[4]));
            }
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
    box.rows = rows_of(shape[3], shape[4], to, box.to_stride[4], strides, bytes, 16 / bytes);
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
    Grid grid{0, 0, used};
    for (int i = 0; i < used; ++i) {
        grid.x = std::max(grid.x, blocks_for(body.boxes[i].rows.items));
        grid.y = std::max<int64_t>(grid.y, body.boxes[i].planes);
    }
    launch(grid, stream, body);
}

}  // namespace concat_kernel

void crop_concat(const CropConcat& call, Stream stream) {
    for (const int64_t size : call.out.shape)
        if (size == 0) return;
    const int64_t bytes = item_bytes(call.out.dtype);
    if (bytes == 1) return concat_kernel::run<uint8_t>(call, stream);
    if (bytes == 2) return concat_kernel::run<uint16_t>(call, stream);
    return concat_kernel::run<uint32_t>(call, stream);
}

}  // namespace unet_rt::cuda
