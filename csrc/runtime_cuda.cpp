#include "runtime_cuda.h"

#include <cuda_runtime_api.h>

namespace unet_rt::cuda {
namespace {

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

std::string device_name() {
    int device = 0, major = 0, minor = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return "this device";
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return "device " + std::to_string(device) + " (compute capability " + std::to_string(major) + "." +
           std::to_string(minor) + ")";
}

std::string in_words(cudaError_t code, const char* action) {
    switch (code) {
        case cudaErrorInsufficientDriver: {
            int driver = 0;
            cudaDriverGetVersion(&driver);
            const std::string found = driver == 0 ? "there is no CUDA driver (libcuda)"
                                                  : "the CUDA driver knows CUDA " + version(driver) + " only";
            return found + "; install the driver of the GPU, for CUDA " + version(CUDART_VERSION) + " or newer";
        }
        case cudaErrorNoDevice:
            return "the CUDA driver sees no device; check nvidia-smi and CUDA_VISIBLE_DEVICES";
        case cudaErrorStubLibrary:
            return "libcuda is a stub for linking, not a driver; install the driver of the GPU, or take the stub off "
                   "the library path";
        case cudaErrorNoKernelImageForDevice:
        case cudaErrorUnsupportedPtxVersion:
            return "this build of the CUDA kernels (" UNET_RT_CUDA_ARCHITECTURES ") does not run on " + device_name() +
                   "; build unet-rt with CUDAARCHS naming that architecture";
        default:
            return std::string(action) + " failed: " + cudaGetErrorString(code) + " (" + cudaGetErrorName(code) + ")";
    }
}

cudaStream_t stream_of(uint64_t handle) { return reinterpret_cast<cudaStream_t>(static_cast<uintptr_t>(handle)); }

cudaGraphExec_t graph_of(uint64_t handle) { return reinterpret_cast<cudaGraphExec_t>(static_cast<uintptr_t>(handle)); }

}  // namespace

void check(int code, const char* action) {
    if (code == cudaSuccess) return;
    cudaGetLastError();  // the next call starts afresh, where the context still lives
    throw DeviceError(in_words(static_cast<cudaError_t>(code), action));
}

std::string missing() {
    int count = 0;
    const cudaError_t code = cudaGetDeviceCount(&count);
    if (code == cudaSuccess && count > 0) return "";
    cudaGetLastError();
    return in_words(code == cudaSuccess ? cudaErrorNoDevice : code, "counting CUDA devices");
}

OnDevice::OnDevice(const std::vector<const void*>& pointers) {
    int wanted = -1;
    for (const void* pointer : pointers) {
        if (pointer == nullptr) continue;
        cudaPointerAttributes attributes{};
        check(cudaPointerGetAttributes(&attributes, pointer), "looking up where an array lies");
        if (attributes.type == cudaMemoryTypeUnregistered)
            throw DeviceError(
                "an array that says it lives on a CUDA device lies in plain host memory; pass it as a "
                "NumPy array");
        if (attributes.type == cudaMemoryTypeHost) continue;  // pinned: every device reaches it
        if (wanted >= 0 && attributes.device != wanted)
            throw DeviceError("arrays lie on CUDA devices " + std::to_string(wanted) + " and " +
                              std::to_string(attributes.device) + "; move them to one device");
        wanted = attributes.device;
    }
    if (wanted < 0) {
        if (const std::string reason = missing(); !reason.empty()) throw DeviceError(reason);
        return;
    }
    int current = 0;
    check(cudaGetDevice(&current), "finding the current device");
    if (current == wanted) return;
    check(cudaSetDevice(wanted), "changing to the arrays' device");
    before_ = current;
}

OnDevice::~OnDevice() {
    if (before_ >= 0) cudaSetDevice(before_);
}

void graph_begin(uint64_t stream) {
    check(cudaStreamBeginCapture(stream_of(stream), cudaStreamCaptureModeThreadLocal), "beginning a CUDA graph");
}

uint64_t graph_end(uint64_t stream) {
    cudaGraph_t graph = nullptr;
    check(cudaStreamEndCapture(stream_of(stream), &graph), "ending a CUDA graph");
    cudaGraphExec_t runnable = nullptr;
    const cudaError_t code = cudaGraphInstantiate(&runnable, graph, 0);
    cudaGraphDestroy(graph);
    check(code, "making a CUDA graph runnable");
    return reinterpret_cast<uintptr_t>(runnable);
}

void graph_launch(uint64_t graph, uint64_t stream) {
    check(cudaGraphLaunch(graph_of(graph), stream_of(stream)), "launching a CUDA graph");
}

void graph_destroy(uint64_t graph) { check(cudaGraphExecDestroy(graph_of(graph)), "destroying a CUDA graph"); }

}  // namespace unet_rt::cuda
