// The C interface on the host (unet_rt.h): checks, then the kernels.
#include "build_info.h"
#include "c_calls.h"

using namespace unet_rt;

int32_t unet_rt_interface(void) { return UNET_RT_INTERFACE; }

const char* unet_rt_version(void) { return UNET_RT_VERSION; }

int32_t unet_rt_gather(const unet_rt_gather_call* call, int64_t* non_finite, unet_rt_error* error) {
    return c::guarded(error, [&] {
        const c::Gather gather(call);
        c::require_host(call->tables_on_device);
        const int64_t found = gather.empty ? 0 : tile_gather(gather.call, c::threads_of(call->threads));
        if (non_finite != nullptr) *non_finite = found;
    });
}

int32_t unet_rt_stitch(const unet_rt_stitch_call* call, unet_rt_error* error) {
    return c::guarded(error, [&] {
        const c::Stitch stitch(call);
        c::require_host(call->tables_on_device);
        tile_stitch(stitch.call, c::threads_of(call->threads));
    });
}

int32_t unet_rt_blend(const unet_rt_blend_call* call, unet_rt_error* error) {
    return c::guarded(error, [&] {
        const c::Blend blend(call);
        c::require_host(call->tables_on_device);
        tile_blend(blend.call, c::threads_of(call->threads));
    });
}

int32_t unet_rt_blend_finish(const unet_rt_finish_call* call, int64_t* uncovered, unet_rt_error* error) {
    return c::guarded(error, [&] {
        const c::Finish finish(call);
        const int64_t found = blend_finish(finish.call, c::threads_of(call->threads));
        if (uncovered != nullptr) *uncovered = found;
    });
}

int32_t unet_rt_crop_concat(const unet_rt_concat_call* call, unet_rt_error* error) {
    return c::guarded(error, [&] {
        const CropConcat concat = c::concat_of(call);
        crop_concat(concat, c::threads_of(call->threads));
    });
}

int32_t unet_rt_histogram(const unet_rt_histogram_call* call, unet_rt_error* error) {
    return c::guarded(error, [&] {
        const Histogram counting = c::histogram_of(call);
        histogram(counting, c::threads_of(call->threads));
    });
}
