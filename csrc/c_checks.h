// Checks of the arrays that callers of unet_rt.h describe: everything that memory safety rests on.
#pragma once

#include <cstdint>
#include <string>

#include "array.h"
#include "unet_rt.h"

namespace unet_rt::c {

constexpr int64_t kFarthest = int64_t{1} << 48;  // px; sums of coordinates stay far from overflow

// The kernels' view of an array: `lead` axes, then one to three spatial axes, before which axes of one sample are put.
// Refuses unknown dtypes, other numbers of axes, sizes and strides whose products cannot be addressed, and null memory.
Array view_of(const char* name, const unet_rt_array& array, int lead);

// Spatial axes of an array with `lead` others.
int spatial_axes(const char* name, const unet_rt_array& array, int lead);

int64_t elements_of(const Array& array);

// Refuses an array that is written if two of its elements share memory.
void require_distinct(const char* name, const Array& array);

// Refuses an array that is written if it may share memory with another one.
void require_apart(const char* name, const Array& written, const char* other_name, const Array& other);

// "3x512x512"
std::string shape_text(const unet_rt_array& array);

[[noreturn]] void refuse(int32_t code, const std::string& text);

}  // namespace unet_rt::c
