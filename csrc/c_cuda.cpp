// The C interface on a CUDA device (unet_rt.h): checks, then the kernels on the caller's stream.
#include "c_calls.h"
#include "c_graphs.h"
#include "kernels_cuda.h"
#include "runtime_cuda.h"

using namespace unet_rt;

namespace {

cuda::DeviceTable device_table(const c::Table& table) { return {table.device, table.axes}; }

// Runs `body` with the arrays' device as the current one.
template <class Body>
void enqueue(const std::vector<const void*>& pointers, const Body& body) {
    try {
        const cuda::OnDevice on_device(pointers);
        body();
    } catch (const cuda::DeviceError& failure) {
        throw c::Refusal(UNET_RT_NO_DEVICE, failure.what());
    }
}

}  // namespace

const char* unet_rt_cuda_missing(void) {
    thread_local std::string reason;
    reason = cuda::missing();
    return reason.empty() ? nullptr : reason.c_str();
}

int32_t unet_rt_cuda_gather(const unet_rt_gather_call* call, uint64_t* non_finite, void* stream, unet_rt_error* error) {
    return c::guarded(error, [&] {
        const c::Gather gather(call);
        const TileGather& g = gather.call;
        enqueue({g.window.data, g.out.data, gather.starts.device, non_finite},
                [&] { cuda::tile_gather(g, device_table(gather.starts), non_finite, stream); });
    });
}

int32_t unet_rt_cuda_stitch(const unet_rt_stitch_call* call, void* stream, unet_rt_error* error) {
    return c::guarded(error, [&] {
        const c::Stitch stitch(call);
        const TileStitch& s = stitch.call;
        enqueue({s.tiles.data, s.out.data, stitch.source.device, stitch.target.device, stitch.extent.device}, [&] {
            cuda::tile_stitch(s, device_table(stitch.source), device_table(stitch.target), device_table(stitch.extent),
                              stream);
        });
    });
}

int32_t unet_rt_cuda_blend(const unet_rt_blend_call* call, void* stream, unet_rt_error* error) {
    return c::guarded(error, [&] {
        const c::Blend blend(call);
        const TileBlend& b = blend.call;
        enqueue({b.tiles.data, b.weight.data, b.total.data, b.weight_total.data, blend.source.device,
                 blend.target.device, blend.extent.device},
                [&] {
                    cuda::tile_blend(b, device_table(blend.source), device_table(blend.target),
                                     device_table(blend.extent), stream);
                });
    });
}

int32_t unet_rt_cuda_blend_finish(const unet_rt_finish_call* call, uint64_t* uncovered, void* stream,
                                  unet_rt_error* error) {
    return c::guarded(error, [&] {
        const c::Finish finish(call);
        const BlendFinish& f = finish.call;
        enqueue({f.total.data, f.weight_total.data, f.out.data, uncovered},
                [&] { cuda::blend_finish(f, uncovered, stream); });
    });
}

int32_t unet_rt_cuda_crop_concat(const unet_rt_concat_call* call, void* stream, unet_rt_error* error) {
    return c::guarded(error, [&] {
        const CropConcat concat = c::concat_of(call);
        enqueue({concat.skip.data, concat.up.data, concat.out.data}, [&] { cuda::crop_concat(concat, stream); });
    });
}

int32_t unet_rt_private_graph_begin(uint64_t stream, unet_rt_error* error) {
    return c::guarded(error, [&] { enqueue({}, [&] { cuda::graph_begin(stream); }); });
}

int32_t unet_rt_private_graph_end(uint64_t stream, uint64_t* graph, unet_rt_error* error) {
    return c::guarded(error, [&] { enqueue({}, [&] { *graph = cuda::graph_end(stream); }); });
}

int32_t unet_rt_private_graph_launch(uint64_t graph, uint64_t stream, unet_rt_error* error) {
    return c::guarded(error, [&] { enqueue({}, [&] { cuda::graph_launch(graph, stream); }); });
}

int32_t unet_rt_private_graph_destroy(uint64_t graph, unet_rt_error* error) {
    return c::guarded(error, [&] { enqueue({}, [&] { cuda::graph_destroy(graph); }); });
}
