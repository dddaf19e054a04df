// From Python arguments to the calls of unet_rt.h. Only this and bind_cuda.h know pybind11. unet_rt/kernels has checked
// before, in words that name Python's arguments; the C interface checks again what memory safety rests on.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "unet_rt.h"

namespace unet_rt {
namespace py = pybind11;

inline int32_t dtype_of(const py::array& array) {
    const char kind = array.dtype().kind();
    const auto bytes = array.itemsize();
    if ((kind == 'u' || kind == 'b') && bytes == 1) return UNET_RT_U8;
    if (kind == 'i' && bytes == 1) return UNET_RT_I8;
    if (kind == 'u' && bytes == 2) return UNET_RT_U16;
    if (kind == 'i' && bytes == 2) return UNET_RT_I16;
    if (kind == 'u' && bytes == 4) return UNET_RT_U32;
    if (kind == 'i' && bytes == 4) return UNET_RT_I32;
    if (kind == 'f' && bytes == 2) return UNET_RT_F16;
    if (kind == 'f' && bytes == 4) return UNET_RT_F32;
    if (kind == 'f' && bytes == 8) return UNET_RT_F64;
    return -1;
}

inline unet_rt_array described(const py::array& array, void* data) {
    unet_rt_array result{};
    result.data = data;
    result.dtype = dtype_of(array);
    result.axes = static_cast<int32_t>(array.ndim());
    for (int axis = 0; axis < array.ndim() && axis < 5; ++axis) {
        result.shape[axis] = array.shape(axis);
        result.stride[axis] = array.strides(axis);
    }
    return result;
}

inline unet_rt_array input(const py::array& array) { return described(array, const_cast<void*>(array.data())); }

inline unet_rt_array output(py::array& array) { return described(array, array.mutable_data()); }  // throws if read-only

using Integers = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

[[noreturn]] inline void raise(const char* error, const std::string& message) {
    py::set_error(py::module_::import("unet_rt.errors").attr(error), message.c_str());
    throw py::error_already_set();
}

// A refusal as the exception that Python has for it.
inline void raise_refusal(const unet_rt_error& error) {
    switch (error.code) {
        case UNET_RT_OK:
            return;
        case UNET_RT_BAD_DTYPE:
            raise("ImageError", error.text);
        case UNET_RT_BAD_SHAPE:
        case UNET_RT_BAD_PLACE:
            raise("TileError", error.text);
        case UNET_RT_BAD_NUMBER:
            raise("ContractError", error.text);
        case UNET_RT_OVERLAP:
            raise("OutputError", error.text);
        case UNET_RT_NO_DEVICE:
            raise("BackendError", error.text);
        case UNET_RT_NO_MEMORY:
            throw std::bad_alloc();
        case UNET_RT_BAD_CALL:
            throw std::invalid_argument(error.text);
        default:
            throw std::runtime_error(error.text);
    }
}

// Runs `body`, a call of the C interface, without the interpreter lock.
template <class Body>
void run(const Body& body) {
    unet_rt_error error;
    {
        const py::gil_scoped_release release;
        body(&error);
    }
    raise_refusal(error);
}

// The rows of a table must be those that the arrays have: the C interface has no way to know.
inline const int64_t* rows_of(const Integers& table, int64_t rows, int32_t axes) {
    if (table.size() != rows * axes)
        throw std::invalid_argument("a table of another size: call through unet_rt.kernels, which checks arguments");
    return table.data();
}

template <class T>
const T* numbers_of(const std::vector<T>& numbers, int64_t count) {
    if (static_cast<int64_t>(numbers.size()) != count)
        throw std::invalid_argument("a table of another size: call through unet_rt.kernels, which checks arguments");
    return numbers.data();
}

// Bounds and values of an operation, and the operation itself.
template <class Call>
void set_operation(Call& call, int op, const std::vector<float>& threshold, const std::vector<uint8_t>& values,
                   int64_t channels) {
    call.op = op;
    if (op == UNET_RT_THRESHOLD) call.threshold = numbers_of(threshold, channels);
    if (op == UNET_RT_THRESHOLD || op == UNET_RT_ARGMAX)
        call.values = numbers_of(values, op == UNET_RT_ARGMAX ? channels : 2);
}

// What a gather is asked beside its arrays and its table.
inline void set_frame(unet_rt_gather_call& call, const Integers& image_shape, const Integers& window_start, int border,
                      double constant) {
    call.image_shape = rows_of(image_shape, 1, call.window.axes - 1);
    call.window_start = rows_of(window_start, 1, call.window.axes - 1);
    call.border = border;
    call.constant = constant;
}

inline void set_affine(unet_rt_gather_call& call, bool affine, const std::vector<double>& offset,
                       const std::vector<double>& divisor, const std::vector<double>& low,
                       const std::vector<double>& high) {
    if (!affine) return;
    const int64_t channels = call.window.shape[0];
    call.offset = numbers_of(offset, channels);
    call.divisor = numbers_of(divisor, channels);
    call.low = numbers_of(low, channels);
    call.high = numbers_of(high, channels);
}

inline int64_t gather(const py::array& window, const Integers& starts, py::array out, const Integers& image_shape,
                      const Integers& window_start, int border, double constant, bool affine,
                      const std::vector<double>& offset, const std::vector<double>& divisor,
                      const std::vector<double>& low, const std::vector<double>& high, int threads) {
    unet_rt_gather_call call{};
    call.size = sizeof call;
    call.window = input(window);
    call.out = output(out);
    call.starts = rows_of(starts, call.out.shape[0], call.window.axes - 1);
    call.threads = threads;
    set_frame(call, image_shape, window_start, border, constant);
    set_affine(call, affine, offset, divisor, low, high);
    int64_t non_finite = 0;
    run([&](unet_rt_error* error) { unet_rt_gather(&call, &non_finite, error); });
    return non_finite;
}

inline void stitch(const py::array& tiles, const Integers& source_start, const Integers& target_start,
                   const Integers& size, py::array out, int op, const std::vector<float>& threshold,
                   const std::vector<uint8_t>& values, int threads) {
    unet_rt_stitch_call call{};
    call.size = sizeof call;
    call.tiles = input(tiles);
    call.out = output(out);
    call.source_start = rows_of(source_start, call.tiles.shape[0], call.tiles.axes - 2);
    call.target_start = rows_of(target_start, call.tiles.shape[0], call.tiles.axes - 2);
    call.extent = rows_of(size, call.tiles.shape[0], call.tiles.axes - 2);
    call.threads = threads;
    set_operation(call, op, threshold, values, call.tiles.shape[1]);
    run([&](unet_rt_error* error) { unet_rt_stitch(&call, error); });
}

inline void blend(const py::array& tiles, const Integers& source_start, const Integers& target_start,
                  const Integers& size, const py::array& weight, py::array total, py::array weight_total, int threads) {
    unet_rt_blend_call call{};
    call.size = sizeof call;
    call.tiles = input(tiles);
    call.weight = input(weight);
    call.total = output(total);
    call.weight_total = output(weight_total);
    call.source_start = rows_of(source_start, call.tiles.shape[0], call.tiles.axes - 2);
    call.target_start = rows_of(target_start, call.tiles.shape[0], call.tiles.axes - 2);
    call.extent = rows_of(size, call.tiles.shape[0], call.tiles.axes - 2);
    call.threads = threads;
    run([&](unet_rt_error* error) { unet_rt_blend(&call, error); });
}

inline int64_t finish(const py::array& total, const py::array& weight_total, py::array out, int op,
                      const std::vector<float>& threshold, const std::vector<uint8_t>& values, int threads) {
    unet_rt_finish_call call{};
    call.size = sizeof call;
    call.total = input(total);
    call.weight_total = input(weight_total);
    call.out = output(out);
    call.threads = threads;
    set_operation(call, op, threshold, values, call.total.shape[0]);
    int64_t uncovered = 0;
    run([&](unet_rt_error* error) { unet_rt_blend_finish(&call, &uncovered, error); });
    return uncovered;
}

inline void count(const py::array& values, py::array_t<int64_t, py::array::c_style> counts, int threads) {
    unet_rt_histogram_call call{};
    call.size = sizeof call;
    // In one axis: C order is all that matters.
    call.values =
        unet_rt_array{const_cast<void*>(values.data()), dtype_of(values), 1, {values.size()}, {values.itemsize()}};
    if (!(values.flags() & py::array::c_style) ||
        counts.size() != int64_t{1} << (8 * std::min<py::ssize_t>(values.itemsize(), 2)))
        throw std::invalid_argument("unsupported array: call through unet_rt.kernels, which checks arguments");
    call.counts = counts.mutable_data();
    call.threads = threads;
    run([&](unet_rt_error* error) { unet_rt_histogram(&call, error); });
}

inline void concat(const py::array& skip, const py::array& up, py::array out, const Integers& offset, int threads) {
    unet_rt_concat_call call{};
    call.size = sizeof call;
    call.skip = input(skip);
    call.up = input(up);
    call.out = output(out);
    call.offset = rows_of(offset, 1, call.up.axes - 2);
    call.threads = threads;
    run([&](unet_rt_error* error) { unet_rt_crop_concat(&call, error); });
}

}  // namespace unet_rt
