#include "c_checks.h"

#include <algorithm>

#include "c_calls.h"

namespace unet_rt::c {
namespace {

constexpr int64_t kMost = int64_t{1} << 62;  // bytes or elements

struct Axis {
    uint64_t stride;  // without its sign
    int64_t size;
};

// Bytes [begin, end) between which all elements of an array lie. view_of() has seen that they can be counted.
struct Range {
    uint64_t begin, end;
};

Range range_of(const Array& array) {
    uint64_t begin = reinterpret_cast<uintptr_t>(array.data), end = begin;
    for (int axis = 0; axis < kMaxAxes; ++axis) {
        const auto reach = static_cast<uint64_t>((array.shape[axis] - 1) * array.stride[axis]);
        (array.stride[axis] < 0 ? begin : end) += reach;  // modulo 2^64: subtracts where it is negative
    }
    return {begin, end + static_cast<uint64_t>(item_bytes(array.dtype))};
}

// Bytes from the first to behind the last of those elements that remain when axes whose strides are multiples of
// `modulus` are folded together; `begin` where they begin modulo it.
uint64_t folded(const Array& array, uint64_t modulus, uint64_t& begin) {
    uint64_t bytes = static_cast<uint64_t>(item_bytes(array.dtype));
    begin = reinterpret_cast<uintptr_t>(array.data);
    for (int axis = 0; axis < kMaxAxes; ++axis) {
        const auto stride = static_cast<uint64_t>(std::abs(array.stride[axis]));
        if (stride % modulus == 0) continue;
        const uint64_t reach = static_cast<uint64_t>(array.shape[axis] - 1) * stride;
        bytes += reach;
        if (array.stride[axis] < 0) begin -= reach;
    }
    begin %= modulus;
    return bytes;
}

// Whether no element of one lies where one of the other does, seen modulo one of their strides: channels of one image,
// columns of one image.
bool interleaved(const Array& a, const Array& b) {
    for (const Array* array : {&a, &b}) {
        for (int axis = 0; axis < kMaxAxes; ++axis) {
            if (array->shape[axis] < 2 || array->stride[axis] == 0) continue;
            const auto modulus = static_cast<uint64_t>(std::abs(array->stride[axis]));
            uint64_t begin_a = 0, begin_b = 0;
            const uint64_t bytes_a = folded(a, modulus, begin_a), bytes_b = folded(b, modulus, begin_b);
            if (bytes_a > modulus || bytes_b > modulus) continue;
            const uint64_t from_a_to_b = (begin_b + modulus - begin_a) % modulus;
            if (from_a_to_b >= bytes_a && modulus - from_a_to_b >= bytes_b) return true;
        }
    }
    return false;
}

}  // namespace

[[noreturn]] void refuse(int32_t code, const std::string& text) { throw Refusal(code, text); }

std::string shape_text(const unet_rt_array& array) {
    std::string text;
    for (int axis = 0; axis < std::clamp<int>(array.axes, 0, kMaxAxes); ++axis)
        text += (axis > 0 ? "x" : "") + std::to_string(array.shape[axis]);
    return text.empty() ? "scalar" : text;
}

int spatial_axes(const char* name, const unet_rt_array& array, int lead) {
    const int spatial = array.axes - lead;
    if (array.axes < 0 || array.axes > kMaxAxes || spatial < 1 || spatial > 3)
        refuse(UNET_RT_BAD_SHAPE, std::string(name) + " has " + std::to_string(array.axes) + " axes; " +
                                      std::to_string(lead) + " and 1 to 3 spatial ones are taken");
    return spatial;
}

Array view_of(const char* name, const unet_rt_array& array, int lead) {
    if (array.dtype < UNET_RT_U8 || array.dtype > UNET_RT_F64)
        refuse(UNET_RT_BAD_DTYPE,
               std::string(name) + " has dtype " + std::to_string(array.dtype) + "; give one of unet_rt_dtype");
    const int spatial = spatial_axes(name, array, lead);
    Array view;
    view.data = static_cast<char*>(array.data);
    view.dtype = static_cast<DType>(array.dtype);
    int64_t elements = 1, reach = item_bytes(view.dtype);
    uint64_t below = 0, above = static_cast<uint64_t>(reach);
    for (int axis = 0; axis < array.axes; ++axis) {
        const int64_t size = array.shape[axis], stride = array.stride[axis];
        const int place = axis < lead ? axis : axis + 3 - spatial;
        if (size < 0 || size > kFarthest)
            refuse(UNET_RT_BAD_SHAPE, std::string(name) + " is " + shape_text(array) + "; sizes are 0 to 2^48");
        if (size > 0 && elements > kMost / size)
            refuse(UNET_RT_BAD_SHAPE, std::string(name) + " is " + shape_text(array) + ", more than 2^62 elements");
        elements *= size;
        view.shape[place] = size;
        view.stride[place] = stride > -kMost && stride < kMost ? stride : 0;  // of one element, where it is not refused
    }
    if (elements == 0) return view;
    for (int axis = 0; axis < array.axes; ++axis) {
        const int64_t size = array.shape[axis], stride = array.stride[axis];
        if (size < 2) continue;
        if (stride <= -kMost || stride >= kMost || std::abs(stride) > (kMost - reach) / (size - 1))
            refuse(UNET_RT_BAD_SHAPE, std::string(name) + " is " + shape_text(array) + " with a stride of " +
                                          std::to_string(stride) + " bytes: more than can be addressed");
        reach += std::abs(stride) * (size - 1);
        (stride < 0 ? below : above) += static_cast<uint64_t>(std::abs(stride) * (size - 1));
    }
    if (view.data == nullptr)
        refuse(UNET_RT_BAD_CALL, std::string(name) + " is " + shape_text(array) + " at a null pointer");
    const uint64_t address = reinterpret_cast<uintptr_t>(view.data);
    if (below > address || above > UINTPTR_MAX - address)
        refuse(UNET_RT_BAD_SHAPE, std::string(name) + " is " + shape_text(array) + " with strides that leave memory");
    return view;
}

int64_t elements_of(const Array& array) {
    int64_t elements = 1;
    for (const int64_t size : array.shape) elements *= size;
    return elements;
}

void require_distinct(const char* name, const Array& array) {
    if (elements_of(array) == 0) return;
    Axis axes[kMaxAxes];
    int count = 0;
    for (int axis = 0; axis < kMaxAxes; ++axis) {
        if (array.shape[axis] < 2) continue;
        const Axis next{static_cast<uint64_t>(std::abs(array.stride[axis])), array.shape[axis]};
        int place = count++;
        for (; place > 0 && axes[place - 1].stride > next.stride; --place) axes[place] = axes[place - 1];
        axes[place] = next;
    }
    auto bytes = static_cast<uint64_t>(item_bytes(array.dtype));
    for (int axis = 0; axis < count; ++axis) {
        if (axes[axis].stride < bytes)
            refuse(UNET_RT_OVERLAP, std::string(name) + " is written, and a stride of " +
                                        std::to_string(axes[axis].stride) + " bytes lays its elements over each other");
        bytes += axes[axis].stride * static_cast<uint64_t>(axes[axis].size - 1);
    }
}

void require_apart(const char* name, const Array& written, const char* other_name, const Array& other) {
    if (elements_of(written) == 0 || elements_of(other) == 0) return;
    const Range a = range_of(written), b = range_of(other);
    if (a.end <= b.begin || b.end <= a.begin || interleaved(written, other)) return;
    refuse(UNET_RT_OVERLAP, std::string(name) + " shares memory with " + other_name + "; pass memory of its own");
}

}  // namespace unet_rt::c
