// From Python arguments to the structs of cudnn_steps.h. unet_rt/backends/cudnn_session.py is the only caller: it plans
// shapes, and makes the device's context current. Maps are (address, stride of n, y and x in bytes); address 0: none.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bind_cuda.h"
#include "cudnn_steps.h"

namespace unet_rt::cuda {

using MapNumbers = std::array<int64_t, 4>;
using Sizes = std::vector<int64_t>;

inline char* address(uint64_t number) { return reinterpret_cast<char*>(static_cast<uintptr_t>(number)); }
inline Stream stream_of(uint64_t number) { return reinterpret_cast<Stream>(static_cast<uintptr_t>(number)); }
inline Map map_of(const MapNumbers& numbers) {
    return {address(static_cast<uint64_t>(numbers[0])), numbers[1], numbers[2], numbers[3]};
}

inline void define_steps(py::module_& m) {
    // (n, channels, y, x)
    m.def("steps_enter", [](uint64_t planar, bool wide, const Sizes& s, const MapNumbers& out, uint64_t stream) {
        enqueue({}, [&] {
            steps_enter(address(planar), wide, s.at(0), s.at(1), s.at(2), s.at(3), map_of(out), stream_of(stream));
        });
    });
    // (n, channels, in_y, in_x), (before_y, before_x), (filters, y, x)
    m.def("steps_first", [](uint64_t planar, bool wide, const Sizes& in, const Sizes& before, uint64_t weights,
                            uint64_t bias, bool relu, const MapNumbers& out, const Sizes& s, uint64_t stream) {
        enqueue({}, [&] {
            steps_first(address(planar), wide, in.at(0), in.at(1), in.at(2), in.at(3), before.at(0), before.at(1),
                        reinterpret_cast<const float*>(address(weights)), reinterpret_cast<const float*>(address(bias)),
                        s.at(0), relu, map_of(out), s.at(1), s.at(2), stream_of(stream));
        });
    });
    // (n, y, x, channels), (start_y, start_x, crop_y, crop_x)
    m.def("steps_pool", [](const MapNumbers& from, const Sizes& s, const MapNumbers& out, const MapNumbers& crop,
                           const Sizes& window, uint64_t stream) {
        enqueue({}, [&] {
            steps_pool(map_of(from), s.at(0), s.at(1), s.at(2), s.at(3), map_of(out), map_of(crop), window.at(0),
                       window.at(1), window.at(2), window.at(3), stream_of(stream));
        });
    });
    m.def("steps_add", [](const MapNumbers& a, const MapNumbers& b, const MapNumbers& out, const Sizes& s, float slope,
                          uint64_t stream) {
        enqueue({}, [&] {
            steps_add(map_of(a), map_of(b), map_of(out), s.at(0), s.at(1), s.at(2), s.at(3), slope, stream_of(stream));
        });
    });
    m.def("steps_resize", [](const MapNumbers& from, const MapNumbers& out, const Sizes& s, int64_t factor, bool linear,
                             uint64_t stream) {
        enqueue({}, [&] {
            steps_resize(map_of(from), map_of(out), s.at(0), s.at(1), s.at(2), s.at(3), factor, linear,
                         stream_of(stream));
        });
    });
    m.def("steps_head", [](const MapNumbers& from, const Sizes& s, const std::vector<float>& weights,
                           const std::vector<float>& bias, int act, uint64_t planar, uint64_t stream) {
        const auto filters = static_cast<int64_t>(bias.size());
        if (static_cast<int64_t>(weights.size()) != filters * s.at(3))
            throw std::invalid_argument("weights of another size than filters and channels");
        enqueue({}, [&] {
            steps_head(map_of(from), s.at(0), s.at(1), s.at(2), s.at(3), weights.data(), bias.data(), filters,
                       static_cast<Activation>(act), address(planar), stream_of(stream));
        });
    });
    m.def("steps_leave", [](const MapNumbers& from, const Sizes& s, int act, uint64_t planar, uint64_t stream) {
        enqueue({}, [&] {
            steps_leave(map_of(from), s.at(0), s.at(1), s.at(2), s.at(3), static_cast<Activation>(act), address(planar),
                        stream_of(stream));
        });
    });
    m.def("steps_fill", [](uint64_t block, int64_t bytes, uint64_t stream) {
        enqueue({}, [&] { steps_fill(address(block), bytes, stream_of(stream)); });
    });
    // (n, y, x, channels), (kernel_y, kernel_x, stride_y, stride_x, dilation_y, dilation_x, before_y, before_x),
    // (y, x, filters)
    m.def("steps_count_wrong",
          [](const MapNumbers& from, const Sizes& s, const std::array<int64_t, 8>& w, uint64_t weights, uint64_t bias,
             bool relu, const MapNumbers& out, const Sizes& out_s, uint64_t count, uint64_t stream) {
              enqueue({}, [&] {
                  steps_count_wrong(map_of(from), s.at(0), s.at(1), s.at(2), s.at(3),
                                    {w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]}, address(weights), address(bias),
                                    out_s.at(2), relu, map_of(out), out_s.at(0), out_s.at(1),
                                    reinterpret_cast<uint64_t*>(address(count)), stream_of(stream));
              });
          });
    // (n, y, x, channels)
    m.def("steps_count_beside",
          [](uint64_t block, int64_t bytes, const MapNumbers& out, const Sizes& s, uint64_t count, uint64_t stream) {
              enqueue({}, [&] {
                  steps_count_beside(address(block), bytes, map_of(out), s.at(0), s.at(1), s.at(2), s.at(3),
                                     reinterpret_cast<uint64_t*>(address(count)), stream_of(stream));
              });
          });
}

}  // namespace unet_rt::cuda
