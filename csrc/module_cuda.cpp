// unet_rt._cuda: lists the CUDA kernels. Private; unet_rt/kernels.py is the way in and documents them.
#include "bind_cuda.h"

PYBIND11_MODULE(_cuda, m, pybind11::mod_gil_not_used()) {
    m.doc() = "CUDA kernels of unet_rt; call them through unet_rt.kernels, which checks arguments.";
    unet_rt::cuda::define(m);
    m.attr("architectures") = UNET_RT_CUDA_ARCHITECTURES;
}
