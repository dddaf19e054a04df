// What the CUDA module asks of the runtime besides launching kernels: errors in words, devices, graphs.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch.h"

namespace unet_rt::cuda {

// Becomes a BackendError.
struct DeviceError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Why nothing can run on this machine; empty if a device is there.
std::string missing();

// For its lifetime the device on which `pointers` (null: of an empty array) lie is the current one. Throws where they
// lie on several, or on none.
class OnDevice {
  public:
    explicit OnDevice(const std::vector<const void*>& pointers);
    ~OnDevice();
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_ = -1;  // device to return to
};

// What is enqueued on the stream between begin and end is not run but becomes a graph, whose handle end returns.
void graph_begin(uint64_t stream);
uint64_t graph_end(uint64_t stream);
void graph_launch(uint64_t graph, uint64_t stream);
void graph_destroy(uint64_t graph);

}  // namespace unet_rt::cuda
