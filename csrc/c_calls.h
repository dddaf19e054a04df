// From the calls of unet_rt.h to those of the kernels: checked, with tables of three axes. Both C libraries, host and
// CUDA, stand on this.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "crop_concat.h"
#include "histogram.h"
#include "tile_gather.h"
#include "tile_stitch.h"
#include "unet_rt.h"

namespace unet_rt::c {

// Why a call is refused.
struct Refusal : std::runtime_error {
    Refusal(int32_t reason, const std::string& text) : std::runtime_error(text), code(reason) {}
    int32_t code;
};

// A table (N, D) of a call: on the host as (N, 3), or where it lies on the device.
struct Table {
    std::vector<int64_t> rows;
    const int64_t* device = nullptr;
    int axes = 0;
};

// Each holds what its `call` points to. Copying one would leave the copy's pointers with the original.
struct Gather {
    explicit Gather(const unet_rt_gather_call* call);
    Gather(const Gather&) = delete;
    Gather& operator=(const Gather&) = delete;
    TileGather call{};
    Table starts;
    std::vector<double> offset, divisor, low, high;
    bool empty = false;  // no sample is written
};

struct Stitch {
    explicit Stitch(const unet_rt_stitch_call* call);
    Stitch(const Stitch&) = delete;
    Stitch& operator=(const Stitch&) = delete;
    TileStitch call{};
    Table source, target, extent;
    uint8_t values[256];
};

struct Blend {
    explicit Blend(const unet_rt_blend_call* call);
    Blend(const Blend&) = delete;
    Blend& operator=(const Blend&) = delete;
    TileBlend call{};
    Table source, target, extent;
};

struct Finish {
    explicit Finish(const unet_rt_finish_call* call);
    Finish(const Finish&) = delete;
    Finish& operator=(const Finish&) = delete;
    BlendFinish call{};
    uint8_t values[256];
};

CropConcat concat_of(const unet_rt_concat_call* call);
Histogram histogram_of(const unet_rt_histogram_call* call);

// Refuses tables on the device in a call for the host.
void require_host(int32_t tables_on_device);

// The number of threads that a call asks for.
int threads_of(int32_t threads);

// Runs `body`, turns what it throws into a code and its words; nothing leaves the C boundary.
int32_t report(int32_t code, const char* text, unet_rt_error* error) noexcept;

template <class Body>
int32_t guarded(unet_rt_error* error, const Body& body) noexcept {
    try {
        body();
        return report(UNET_RT_OK, "", error);
    } catch (const Refusal& refusal) {
        return report(refusal.code, refusal.what(), error);
    } catch (const std::length_error& excess) {
        return report(UNET_RT_BAD_SHAPE, (std::string(excess.what()) + "; use smaller arrays").c_str(), error);
    } catch (const std::bad_alloc&) {
        return report(UNET_RT_NO_MEMORY, "memory is short; pass fewer or smaller tiles in one call", error);
    } catch (const std::exception& mistake) {
        return report(UNET_RT_INTERNAL, mistake.what(), error);
    } catch (...) {
        return report(UNET_RT_INTERNAL, "an unknown exception", error);
    }
}

}  // namespace unet_rt::c
