// unet_rt._cpu: lists the kernels. Private; unet_rt/kernels.py is the way in and documents them.
#include "bind.h"
#include "build_info.h"

PYBIND11_MODULE(_cpu, m, pybind11::mod_gil_not_used()) {
    using namespace unet_rt;
    m.doc() = "CPU kernels of unet_rt; call them through unet_rt.kernels, which checks arguments.";
    m.def("tile_gather", &gather);
    m.def("tile_stitch", &stitch);
    m.def("tile_blend", &blend);
    m.def("blend_finish", &finish);
    m.def("crop_concat", &concat);
    m.def("histogram", &count);
    m.attr("build_info") =
        pybind11::dict(pybind11::arg("compiler") = UNET_RT_COMPILER, pybind11::arg("cuda") = UNET_RT_CUDA_STATUS);
}
