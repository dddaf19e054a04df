// From Python arguments to the CUDA kernels' structs. unet_rt/kernels.py has checked dtypes, shapes and ranges before,
// and describes each array as (pointer, dtype, shape, strides in bytes), dtype by its place in DType.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bind.h"
#include "kernels_cuda.h"
#include "runtime_cuda.h"

namespace unet_rt::cuda {
namespace py = pybind11;

struct View {
    Array array;
    int spatial;  // axes
};

inline char* pointer_of(const py::handle& number) {
    return reinterpret_cast<char*>(static_cast<uintptr_t>(number.cast<uint64_t>()));
}

// `lead` axes, then one to three spatial axes, before which axes of one sample are put.
inline View view_of(const py::tuple& description, int lead) {
    if (description.size() != 4) throw std::invalid_argument("call through unet_rt.kernels, which describes arrays");
    const auto shape = description[2].cast<std::vector<int64_t>>();
    const auto strides = description[3].cast<std::vector<int64_t>>();
    const int axes = static_cast<int>(shape.size());
    const int dtype = description[1].cast<int>();
    const int spatial = axes - lead;
    if (spatial < 1 || spatial > 3 || strides.size() != shape.size() || dtype < 0 ||
        dtype > static_cast<int>(DType::f64))
        throw std::invalid_argument("unsupported array: call through unet_rt.kernels, which checks arguments");
    View view{};
    view.spatial = spatial;
    view.array.data = pointer_of(description[0]);
    view.array.dtype = static_cast<DType>(dtype);
    for (int axis = 0; axis < axes; ++axis) {
        const int place = axis < lead ? axis : axis + 3 - spatial;
        view.array.shape[place] = shape[static_cast<size_t>(axis)];
        view.array.stride[place] = strides[static_cast<size_t>(axis)];
    }
    return view;
}

// The output of an operation: one channel where it has no channel axis, so that kernels see four axes.
inline Array result_view(const py::tuple& description, Op op) {
    Array array = view_of(description, op == Op::argmax ? 0 : 1).array;
    if (op != Op::argmax) return array;
    for (int axis = 3; axis > 0; --axis) {
        array.shape[axis] = array.shape[axis - 1];
        array.stride[axis] = array.stride[axis - 1];
    }
    array.shape[0] = 1;
    array.stride[0] = 0;
    return array;
}

// A table of coordinates: a NumPy array, or the description of an array on the device.
struct Coordinates {
    std::vector<int64_t> host;  // (N, 3)
    DeviceTable device;

    Coordinates(const py::object& table, int64_t missing) {
        if (py::isinstance<py::tuple>(table)) {
            const auto description = table.cast<py::tuple>();
            device.data = reinterpret_cast<const int64_t*>(pointer_of(description[0]));
            device.axes = description[2].cast<std::vector<int>>().at(1);
        } else {
            host = three_axes(table.cast<Integers>(), missing);
        }
    }

    const int64_t* data() const { return host.data(); }
};

// Runs `body` on the arrays' device without the interpreter lock; errors of the device become a BackendError.
template <class Body>
void enqueue(const std::vector<const void*>& pointers, const Body& body) {
    std::string failure, excess;
    {
        const py::gil_scoped_release release;
        try {
            const OnDevice on_device(pointers);
            body();
        } catch (const DeviceError& error) {
            failure = error.what();
        } catch (const std::length_error& error) {
            excess = error.what();
        }
    }
    if (!failure.empty()) raise("BackendError", failure);
    if (!excess.empty()) raise("TileError", excess + "; use smaller arrays");
}

inline void gather(const py::tuple& window, const py::object& starts, const py::tuple& out, const Integers& image_shape,
                   const Integers& window_start, int border, double constant, bool affine,
                   const std::vector<double>& offset, const std::vector<double>& divisor,
                   const std::vector<double>& low, const std::vector<double>& high, uint64_t non_finite,
                   uint64_t stream) {
    TileGather call{};
    const View from = view_of(window, 1);
    call.window = from.array;
    call.out = view_of(out, 2).array;
    const Coordinates begin(starts, 0);
    const auto shape = three_axes(image_shape, 1);
    const auto held = three_axes(window_start, 0);
    for (int axis = 0; axis < 3; ++axis) {
        call.image_shape[axis] = shape[static_cast<size_t>(axis)];
        call.window_start[axis] = held[static_cast<size_t>(axis)];
    }
    call.starts = begin.data();
    call.border = static_cast<Border>(border);
    call.affine = affine;
    call.constant = constant;
    call.offset = offset.data();
    call.divisor = divisor.data();
    call.low = low.data();
    call.high = high.data();
    if (begin.device.data == nullptr) {
        const GatherGap gap = find_gap(call);
        if (gap.found) raise_gap(call, gap, from.spatial);
    }
    auto* const counter = reinterpret_cast<uint64_t*>(static_cast<uintptr_t>(non_finite));
    enqueue({call.window.data, call.out.data, begin.device.data, counter}, [&] {
        tile_gather(call, begin.device, counter, reinterpret_cast<Stream>(static_cast<uintptr_t>(stream)));
    });
}

inline void stitch(const py::tuple& tiles, const py::object& source_start, const py::object& target_start,
                   const py::object& size, const py::tuple& out, int op, const std::vector<float>& threshold,
                   const std::vector<uint8_t>& values, uint64_t stream) {
    TileStitch call{};
    call.tiles = view_of(tiles, 2).array;
    call.op = static_cast<Op>(op);
    call.out = result_view(out, call.op);
    const Coordinates from(source_start, 0), to(target_start, 0), extent(size, 1);
    call.source_start = from.data();
    call.target_start = to.data();
    call.size = extent.data();
    call.threshold = threshold.data();
    call.values = values.data();
    enqueue({call.tiles.data, call.out.data, from.device.data, to.device.data, extent.device.data}, [&] {
        tile_stitch(call, from.device, to.device, extent.device,
                    reinterpret_cast<Stream>(static_cast<uintptr_t>(stream)));
    });
}

inline void blend(const py::tuple& tiles, const py::object& source_start, const py::object& target_start,
                  const py::object& size, const py::tuple& weight, const py::tuple& total,
                  const py::tuple& weight_total, uint64_t stream) {
    TileBlend call{};
    call.tiles = view_of(tiles, 2).array;
    call.weight = view_of(weight, 0).array;
    call.total = view_of(total, 1).array;
    call.weight_total = view_of(weight_total, 0).array;
    const Coordinates from(source_start, 0), to(target_start, 0), extent(size, 1);
    call.source_start = from.data();
    call.target_start = to.data();
    call.size = extent.data();
    enqueue({call.tiles.data, call.weight.data, call.total.data, call.weight_total.data, from.device.data,
             to.device.data, extent.device.data},
            [&] {
                tile_blend(call, from.device, to.device, extent.device,
                           reinterpret_cast<Stream>(static_cast<uintptr_t>(stream)));
            });
}

inline void finish(const py::tuple& total, const py::tuple& weight_total, const py::tuple& out, int op,
                   const std::vector<float>& threshold, const std::vector<uint8_t>& values, uint64_t uncovered,
                   uint64_t stream) {
    BlendFinish call{};
    call.total = view_of(total, 1).array;
    call.weight_total = view_of(weight_total, 0).array;
    call.op = static_cast<Op>(op);
    call.out = result_view(out, call.op);
    call.threshold = threshold.data();
    call.values = values.data();
    auto* const counter = reinterpret_cast<uint64_t*>(static_cast<uintptr_t>(uncovered));
    enqueue({call.total.data, call.weight_total.data, call.out.data, counter},
            [&] { blend_finish(call, counter, reinterpret_cast<Stream>(static_cast<uintptr_t>(stream))); });
}

inline void concat(const py::tuple& skip, const py::tuple& up, const py::tuple& out, const Integers& offset,
                   uint64_t stream) {
    CropConcat call{};
    call.skip = view_of(skip, 2).array;
    call.up = view_of(up, 2).array;
    call.out = view_of(out, 2).array;
    const auto start = three_axes(offset, 0);
    for (int axis = 0; axis < 3; ++axis) call.offset[axis] = start[static_cast<size_t>(axis)];
    enqueue({call.skip.data, call.up.data, call.out.data},
            [&] { crop_concat(call, reinterpret_cast<Stream>(static_cast<uintptr_t>(stream))); });
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
    m.def("missing", &missing);
    m.def("graph_begin", [](uint64_t stream) { enqueue({}, [&] { graph_begin(stream); }); });
    m.def("graph_end", [](uint64_t stream) {
        uint64_t graph = 0;
        enqueue({}, [&] { graph = graph_end(stream); });
        return graph;
    });
    m.def("graph_launch", [](uint64_t graph, uint64_t stream) { enqueue({}, [&] { graph_launch(graph, stream); }); });
    m.def("graph_destroy", [](uint64_t graph) { enqueue({}, [&] { graph_destroy(graph); }); });
}

}  // namespace unet_rt::cuda
