// From Python arguments to the kernels' structs. Only this and bind_cuda.h know pybind11; unet_rt/kernels.py has
// checked dtypes, shapes and ranges before, so nothing is checked here but what memory safety rests on.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "array.h"
#include "crop_concat.h"
#include "histogram.h"
#include "tile_gather.h"
#include "tile_stitch.h"

namespace unet_rt {
namespace py = pybind11;

inline DType dtype_of(const py::array& array) {
    const char kind = array.dtype().kind();
    const auto bytes = array.itemsize();
    if ((kind == 'u' || kind == 'b') && bytes == 1) return DType::u8;
    if (kind == 'i' && bytes == 1) return DType::i8;
    if (kind == 'u' && bytes == 2) return DType::u16;
    if (kind == 'i' && bytes == 2) return DType::i16;
    if (kind == 'u' && bytes == 4) return DType::u32;
    if (kind == 'i' && bytes == 4) return DType::i32;
    if (kind == 'f' && bytes == 2) return DType::f16;
    if (kind == 'f' && bytes == 4) return DType::f32;
    if (kind == 'f' && bytes == 8) return DType::f64;
    throw std::invalid_argument("unsupported dtype: call through unet_rt.kernels, which checks arguments");
}

// `lead` axes, then one to three spatial axes, before which axes of one sample are put.
inline Array view(const py::array& array, int lead, char* data) {
    const int spatial = static_cast<int>(array.ndim()) - lead;
    if (spatial < 1 || spatial > 3)
        throw std::invalid_argument("unsupported number of axes: call through unet_rt.kernels, which checks arguments");
    Array result;
    result.data = data;
    result.dtype = dtype_of(array);
    for (int axis = 0; axis < array.ndim(); ++axis) {
        const int place = axis < lead ? axis : axis + 3 - spatial;
        result.shape[place] = array.shape(axis);
        result.stride[place] = array.strides(axis);
    }
    return result;
}

inline Array input_view(const py::array& array, int lead) {
    return view(array, lead, const_cast<char*>(static_cast<const char*>(array.data())));
}

inline Array output_view(py::array& array, int lead) {
    return view(array, lead, static_cast<char*>(array.mutable_data()));  // throws where it is read-only
}

using Integers = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// (N, D) as (N, 3), or (D,) as (3,), the missing first axes filled.
inline std::vector<int64_t> three_axes(const Integers& table, int64_t missing) {
    const int64_t axes = table.shape(table.ndim() - 1);
    if (axes < 1 || axes > 3)
        throw std::invalid_argument("unsupported number of axes: call through unet_rt.kernels, which checks arguments");
    const int64_t rows = table.ndim() == 1 ? 1 : table.shape(0);
    std::vector<int64_t> result(static_cast<size_t>(rows * 3), missing);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t axis = 0; axis < axes; ++axis)
            result[static_cast<size_t>(row * 3 + 3 - axes + axis)] = table.data()[row * axes + axis];
    return result;
}

[[noreturn]] inline void raise(const char* error, const std::string& message) {
    py::set_error(py::module_::import("unet_rt.errors").attr(error), message.c_str());
    throw py::error_already_set();
}

[[noreturn]] inline void raise_gap(const TileGather& call, const GatherGap& gap, int spatial) {
    const int64_t first = call.window_start[gap.axis];
    const int64_t last = first + call.window.shape[1 + gap.axis] - 1;
    raise("TileError", "tile " + std::to_string(gap.tile) + " needs image pixels " + std::to_string(gap.first) +
                           " to " + std::to_string(gap.last) + " along spatial axis " +
                           std::to_string(gap.axis - (3 - spatial)) + ", but the window holds " +
                           std::to_string(first) + " to " + std::to_string(last) +
                           "; read a window that covers the tile, mirrored border pixels included");
}

inline int64_t gather(const py::array& window, const Integers& starts, py::array out, const Integers& image_shape,
                      const Integers& window_start, int border, double constant, bool affine,
                      const std::vector<double>& offset, const std::vector<double>& divisor,
                      const std::vector<double>& low, const std::vector<double>& high, int threads) {
    TileGather call{};
    call.window = input_view(window, 1);
    call.out = output_view(out, 2);
    const auto begin = three_axes(starts, 0);
    const auto shape = three_axes(image_shape, 1);
    const auto held = three_axes(window_start, 0);
    for (int axis = 0; axis < 3; ++axis) {
        call.image_shape[axis] = shape[axis];
        call.window_start[axis] = held[axis];
    }
    call.starts = begin.data();
    call.border = static_cast<Border>(border);
    call.affine = affine;
    call.constant = constant;
    call.offset = offset.data();
    call.divisor = divisor.data();
    call.low = low.data();
    call.high = high.data();
    GatherGap gap;
    int64_t non_finite = 0;
    {
        const py::gil_scoped_release release;
        gap = find_gap(call);
        if (!gap.found) non_finite = tile_gather(call, threads);
    }
    if (gap.found) raise_gap(call, gap, static_cast<int>(window.ndim() - 1));
    return non_finite;
}

inline void stitch(const py::array& tiles, const Integers& source_start, const Integers& target_start,
                   const Integers& size, py::array out, int op, const std::vector<float>& threshold,
                   const std::vector<uint8_t>& values, int threads) {
    TileStitch call{};
    call.tiles = input_view(tiles, 2);
    call.op = static_cast<Op>(op);
    call.out = output_view(out, call.op == Op::argmax ? 0 : 1);
    if (call.op == Op::argmax) {  // one channel, so that kernels see four axes
        for (int axis = 3; axis > 0; --axis) {
            call.out.shape[axis] = call.out.shape[axis - 1];
            call.out.stride[axis] = call.out.stride[axis - 1];
        }
        call.out.shape[0] = 1;
        call.out.stride[0] = 0;
    }
    const auto from = three_axes(source_start, 0);
    const auto to = three_axes(target_start, 0);
    const auto extent = three_axes(size, 1);
    call.source_start = from.data();
    call.target_start = to.data();
    call.size = extent.data();
    call.threshold = threshold.data();
    call.values = values.data();
    const py::gil_scoped_release release;
    tile_stitch(call, threads);
}

inline void blend(const py::array& tiles, const Integers& source_start, const Integers& target_start,
                  const Integers& size, const py::array& weight, py::array total, py::array weight_total, int threads) {
    TileBlend call{};
    call.tiles = input_view(tiles, 2);
    call.weight = input_view(weight, 0);
    call.total = output_view(total, 1);
    call.weight_total = output_view(weight_total, 0);
    const auto from = three_axes(source_start, 0);
    const auto to = three_axes(target_start, 0);
    const auto extent = three_axes(size, 1);
    call.source_start = from.data();
    call.target_start = to.data();
    call.size = extent.data();
    const py::gil_scoped_release release;
    tile_blend(call, threads);
}

inline int64_t finish(const py::array& total, const py::array& weight_total, py::array out, int op,
                      const std::vector<float>& threshold, const std::vector<uint8_t>& values, int threads) {
    BlendFinish call{};
    call.total = input_view(total, 1);
    call.weight_total = input_view(weight_total, 0);
    call.op = static_cast<Op>(op);
    call.out = output_view(out, call.op == Op::argmax ? 0 : 1);
    if (call.op == Op::argmax) {
        for (int axis = 3; axis > 0; --axis) {
            call.out.shape[axis] = call.out.shape[axis - 1];
            call.out.stride[axis] = call.out.stride[axis - 1];
        }
        call.out.shape[0] = 1;
        call.out.stride[0] = 0;
    }
    call.threshold = threshold.data();
    call.values = values.data();
    const py::gil_scoped_release release;
    return blend_finish(call, threads);
}

inline void count(const py::array& values, py::array_t<int64_t, py::array::c_style> counts, int threads) {
    const int64_t kinds = int64_t{1} << (8 * values.itemsize());
    if (!(values.flags() & py::array::c_style) || values.itemsize() > 2 || counts.size() != kinds)
        throw std::invalid_argument("unsupported array: call through unet_rt.kernels, which checks arguments");
    const Histogram call{values.data(), values.size(), static_cast<int>(values.itemsize()), counts.mutable_data()};
    const py::gil_scoped_release release;
    histogram(call, threads);
}

inline void concat(const py::array& skip, const py::array& up, py::array out, const Integers& offset, int threads) {
    CropConcat call{};
    call.skip = input_view(skip, 2);
    call.up = input_view(up, 2);
    call.out = output_view(out, 2);
    const auto start = three_axes(offset, 0);
    for (int axis = 0; axis < 3; ++axis) call.offset[axis] = start[axis];
    const py::gil_scoped_release release;
    crop_concat(call, threads);
}

}  // namespace unet_rt
