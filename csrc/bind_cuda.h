// From Python arguments to the CUDA calls of unet_rt.h. unet_rt/kernels has checked dtypes, shapes and ranges before,
// and describes each array as (pointer, dtype, shape, strides in bytes), dtype by its place in unet_rt_dtype.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bind.h"
#include "c_graphs.h"

namespace unet_rt::cuda {
namespace py = pybind11;

template <class T>
T* pointer_of(const py::handle& number) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(number.cast<uint64_t>()));
}

inline void* stream_of(uint64_t stream) { return reinterpret_cast<void*>(static_cast<uintptr_t>(stream)); }

inline unet_rt_array array_of(const py::tuple& description) {
    if (description.size() != 4) throw std::invalid_argument("call through unet_rt.kernels, which describes arrays");
    const auto shape = description[2].cast<std::vector<int64_t>>();
    const auto strides = description[3].cast<std::vector<int64_t>>();
    unet_rt_array array{};
    array.data = pointer_of<void>(description[0]);
    array.dtype = description[1].cast<int>();
    array.axes = static_cast<int32_t>(shape.size());
    for (size_t axis = 0; axis < std::min({shape.size(), strides.size(), size_t{5}}); ++axis) {
        array.shape[axis] = shape[axis];
        array.stride[axis] = strides[axis];
    }
    return array;
}

// A table of coordinates: a NumPy array, or the description of an array on the device.
class Coordinates {
  public:
    Coordinates(const py::object& table, int64_t rows, int32_t axes) : on_device_(py::isinstance<py::tuple>(table)) {
        if (on_device_) {
            data_ = pointer_of<const int64_t>(table.cast<py::tuple>()[0]);
        } else {
            host_ = table.cast<Integers>();
            data_ = rows_of(host_, rows, axes);
        }
    }
    const int64_t* data() const { return data_; }
    bool on_device() const { return on_device_; }

  private:
    Integers host_;
    const int64_t* data_ = nullptr;
    bool on_device_;
};

inline void gather(const py::tuple& window, const py::object& starts, const py::tuple& out, const Integers& image_shape,
                   const Integers& window_start, int border, double constant, bool affine,
                   const std::vector<double>& offset, const std::vector<double>& divisor,
                   const std::vector<double>& low, const std::vector<double>& high, uint64_t non_finite,
                   uint64_t stream) {
    unet_rt_gather_call call{};
    call.size = sizeof call;
    call.window = array_of(window);
    call.out = array_of(out);
    const Coordinates begin(starts, call.out.shape[0], call.window.axes - 1);
    call.starts = begin.data();
    call.tables_on_device = begin.on_device();
    set_frame(call, image_shape, window_start, border, constant);
    set_affine(call, affine, offset, divisor, low, high);
    auto* const counter = reinterpret_cast<uint64_t*>(static_cast<uintptr_t>(non_finite));
    run([&](unet_rt_error* error) { unet_rt_cuda_gather(&call, counter, stream_of(stream), error); });
}

inline void stitch(const py::tuple& tiles, const py::object& source_start, const py::object& target_start,
                   const py::object& size, const py::tuple& out, int op, const std::vector<float>& threshold,
                   const std::vector<uint8_t>& values, uint64_t stream) {
    unet_rt_stitch_call call{};
    call.size = sizeof call;
    call.tiles = array_of(tiles);
    call.out = array_of(out);
    const int64_t rows = call.tiles.shape[0];
    const int32_t axes = call.tiles.axes - 2;
    const Coordinates from(source_start, rows, axes), to(target_start, rows, axes), extent(size, rows, axes);
    call.source_start = from.data();
    call.target_start = to.data();
    call.extent = extent.data();
    call.tables_on_device = from.on_device();
    set_operation(call, op, threshold, values, call.tiles.shape[1]);
    run([&](unet_rt_error* error) { unet_rt_cuda_stitch(&call, stream_of(stream), error); });
}

inline void blend(const py::tuple& tiles, const py::object& source_start, const py::object& target_start,
                  const py::object& size, const py::tuple& weight, const py::tuple& total,
                  const py::tuple& weight_total, uint64_t stream) {
    unet_rt_blend_call call{};
    call.size = sizeof call;
    call.tiles = array_of(tiles);
    call.weight = array_of(weight);
    call.total = array_of(total);
    call.weight_total = array_of(weight_total);
    const int64_t rows = call.tiles.shape[0];
    const int32_t axes = call.tiles.axes - 2;
    const Coordinates from(source_start, rows, axes), to(target_start, rows, axes), extent(size, rows, axes);
    call.source_start = from.data();
    call.target_start = to.data();
    call.extent = extent.data();
    call.tables_on_device = from.on_device();
    run([&](unet_rt_error* error) { unet_rt_cuda_blend(&call, stream_of(stream), error); });
}

inline void finish(const py::tuple& total, const py::tuple& weight_total, const py::tuple& out, int op,
                   const std::vector<float>& threshold, const std::vector<uint8_t>& values, uint64_t uncovered,
                   uint64_t stream) {
    unet_rt_finish_call call{};
    call.size = sizeof call;
    call.total = array_of(total);
    call.weight_total = array_of(weight_total);
    call.out = array_of(out);
    set_operation(call, op, threshold, values, call.total.shape[0]);
    auto* const counter = reinterpret_cast<uint64_t*>(static_cast<uintptr_t>(uncovered));
    run([&](unet_rt_error* error) { unet_rt_cuda_blend_finish(&call, counter, stream_of(stream), error); });
}

inline void concat(const py::tuple& skip, const py::tuple& up, const py::tuple& out, const Integers& offset,
                   uint64_t stream) {
    unet_rt_concat_call call{};
    call.size = sizeof call;
    call.skip = array_of(skip);
    call.up = array_of(up);
    call.out = array_of(out);
    call.offset = rows_of(offset, 1, call.up.axes - 2);
    run([&](unet_rt_error* error) { unet_rt_cuda_crop_concat(&call, stream_of(stream), error); });
}

// ---------------------------------------------------------------------------------------------------------- DLPack

// As the DLPack standard lays them out, up to what is read here.
struct DlTensor {
    void* data;
    int32_t device_type;
    int32_t device_id;
    int32_t axes;
    uint8_t type_code;
    uint8_t type_bits;
    uint16_t type_lanes;
    const int64_t* shape;
    const int64_t* strides;  // in elements; null: C order
    uint64_t byte_offset;
};

struct DlVersionedTensor {
    uint32_t major, minor;
    void* context;
    void (*deleter)(void*);
    uint64_t flags;  // bit 0: read-only
    DlTensor tensor;
};

// What `__dlpack__` returned, as (pointer, type code, bytes per element, shape, strides in bytes, read-only). The
// capsule stays its owner's: who asks keeps it as long as the description is used.
inline py::tuple dlpack_description(const py::capsule& capsule) {
    const std::string name = capsule.name() == nullptr ? "" : capsule.name();
    const DlTensor* tensor = nullptr;
    bool read_only = false;
    if (name == "dltensor") {
        tensor = static_cast<const DlTensor*>(capsule.get_pointer());
    } else if (name == "dltensor_versioned") {
        const auto* versioned = static_cast<const DlVersionedTensor*>(capsule.get_pointer());
        if (versioned->major > 1) throw std::invalid_argument("a DLPack version above 1");
        read_only = (versioned->flags & 1) != 0;
        tensor = &versioned->tensor;
    } else {
        throw std::invalid_argument("no DLPack capsule");
    }
    if (tensor->type_lanes != 1 || tensor->type_bits % 8 != 0) throw std::invalid_argument("packed elements");
    const int64_t bytes = tensor->type_bits / 8;
    std::vector<int64_t> shape(tensor->shape, tensor->shape + tensor->axes);
    std::vector<int64_t> strides(shape.size());
    int64_t dense = bytes;
    for (size_t axis = shape.size(); axis-- > 0;) {
        strides[axis] = tensor->strides == nullptr ? dense : tensor->strides[axis] * bytes;
        dense *= shape[axis];
    }
    return py::make_tuple(reinterpret_cast<uintptr_t>(tensor->data) + tensor->byte_offset,
                          static_cast<int>(tensor->type_code), bytes, py::tuple(py::cast(shape)),
                          py::tuple(py::cast(strides)), read_only);
}

inline void define(py::module_& m) {
    m.def("tile_gather", &gather);
    m.def("tile_stitch", &stitch);
    m.def("tile_blend", &blend);
    m.def("blend_finish", &finish);
    m.def("crop_concat", &concat);
    m.def("dlpack_description", &dlpack_description);
    m.def("missing", [] {
        const char* const reason = unet_rt_cuda_missing();
        return std::string(reason == nullptr ? "" : reason);
    });
    m.def("graph_begin",
          [](uint64_t stream) { run([&](unet_rt_error* error) { unet_rt_private_graph_begin(stream, error); }); });
    m.def("graph_end", [](uint64_t stream) {
        uint64_t graph = 0;
        run([&](unet_rt_error* error) { unet_rt_private_graph_end(stream, &graph, error); });
        return graph;
    });
    m.def("graph_launch", [](uint64_t graph, uint64_t stream) {
        run([&](unet_rt_error* error) { unet_rt_private_graph_launch(graph, stream, error); });
    });
    m.def("graph_destroy",
          [](uint64_t graph) { run([&](unet_rt_error* error) { unet_rt_private_graph_destroy(graph, error); }); });
}

}  // namespace unet_rt::cuda
