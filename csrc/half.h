// Rows of float16 to float32 and back, with the conversion instructions of x86 where the machine has them. The bits are
// those of float_of_half() and half_of_float() in geometry.h, which convert elsewhere and at the ends of rows.
#pragma once

#include <cstdint>

namespace unet_rt {

// `count` adjacent halves, of any alignment.
void widen_row(const char* halves, int64_t count, float* values);

// To `count` adjacent halves, of any alignment.
void narrow_row(const float* values, int64_t count, char* halves);

}  // namespace unet_rt
