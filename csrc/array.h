// Plain views of memory that somebody else owns, in a form that a CUDA kernel can take by value.
#pragma once

#include <cstdint>

namespace unet_rt {

enum class DType : int { u8, i8, u16, i16, u32, i32, f16, f32, f64 };  // bool travels as u8

constexpr int kMaxAxes = 5;  // N, C and three spatial axes

// Strides are in bytes and may be negative, zero, or no multiple of the element size. Kernels see three spatial axes:
// the binding puts axes of one sample in front of the spatial axes of images and signals.
struct Array {
    char* data = nullptr;
    DType dtype = DType::u8;
    int64_t shape[kMaxAxes] = {1, 1, 1, 1, 1};
    int64_t stride[kMaxAxes] = {0, 0, 0, 0, 0};
};

inline int64_t item_bytes(DType dtype) {
    switch (dtype) {
        case DType::u8:
        case DType::i8:
            return 1;
        case DType::u16:
        case DType::i16:
        case DType::f16:
            return 2;
        case DType::f64:
            return 8;
        default:
            return 4;
    }
}

}  // namespace unet_rt
