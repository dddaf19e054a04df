// unet_rt._cuda_host: the bodies of the CUDA kernels, run by an ordinary C++ compiler on host memory. For tests alone.
#include <pybind11/functional.h>

#include "bind_cuda.h"
#include "c_cuda.cpp"
#include "crop_concat.cu"
#include "tile_gather.cu"
#include "tile_stitch.cu"

namespace unet_rt::cuda {

void check(int, const char*) {}

std::string missing() { return ""; }

OnDevice::OnDevice(const std::vector<const void*>&) {}
OnDevice::~OnDevice() { before_ = -1; }

void graph_begin(uint64_t) { throw DeviceError("host memory has no streams"); }
uint64_t graph_end(uint64_t) { throw DeviceError("host memory has no streams"); }
void graph_launch(uint64_t, uint64_t) { throw DeviceError("host memory has no streams"); }
void graph_destroy(uint64_t) { throw DeviceError("host memory has no streams"); }

}  // namespace unet_rt::cuda

namespace py = pybind11;

PYBIND11_MODULE(_cuda_host, m, pybind11::mod_gil_not_used()) {
    m.doc() = "Bodies of the CUDA kernels on host memory, for tests.";
    unet_rt::cuda::define(m);
    // (mangled type of the body, grid, the body's bytes); None: the bodies run here again.
    m.def("set_launcher", [](const py::object& take) {
        unet_rt::cuda::launcher = nullptr;
        if (take.is_none()) return;
        unet_rt::cuda::launcher = [take](const std::type_info& type, const unet_rt::cuda::Grid& grid, const void* body,
                                         size_t bytes) {
            const py::gil_scoped_acquire acquire;
            take(type.name(), py::make_tuple(grid.x, grid.y, grid.z), py::bytes(static_cast<const char*>(body), bytes));
        };
    });
}
