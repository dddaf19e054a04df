// CUDA graphs for unet_rt._cuda: exported by the library, and no part of its public interface.
#pragma once

#include "unet_rt.h"

extern "C" {
UNET_RT_API int32_t unet_rt_private_graph_begin(uint64_t stream, unet_rt_error* error);
UNET_RT_API int32_t unet_rt_private_graph_end(uint64_t stream, uint64_t* graph, unet_rt_error* error);
UNET_RT_API int32_t unet_rt_private_graph_launch(uint64_t graph, uint64_t stream, unet_rt_error* error);
UNET_RT_API int32_t unet_rt_private_graph_destroy(uint64_t graph, unet_rt_error* error);
}
