// What becomes of a pixel's value in tile_gather, per pixel type; shared by the CPU and the CUDA kernel.
#pragma once

#include <cmath>
#include <cstdint>

#include "array.h"
#include "geometry.h"

namespace unet_rt {

// Compute: the type of the arithmetic. float16 pixels are widened first, which keeps whether they are finite.
template <class T>
struct Pixel {
    using Compute = float;
    static UNET_RT_HD float value(T x) { return static_cast<float>(x); }
    static UNET_RT_HD uint32_t non_finite(T) { return 0; }
};
template <>
struct Pixel<uint32_t> {
    using Compute = double;
    static UNET_RT_HD double value(uint32_t x) { return static_cast<double>(x); }
    static UNET_RT_HD uint32_t non_finite(uint32_t) { return 0; }
};
template <>
struct Pixel<int32_t> {
    using Compute = double;
    static UNET_RT_HD double value(int32_t x) { return static_cast<double>(x); }
    static UNET_RT_HD uint32_t non_finite(int32_t) { return 0; }
};
template <>
struct Pixel<half> {
    using Compute = float;
    static UNET_RT_HD float value(half x) { return float_of_half(x); }
    static UNET_RT_HD uint32_t non_finite(half x) { return (x.bits & 0x7c00u) == 0x7c00u ? 1 : 0; }
};
template <>
struct Pixel<float> {
    using Compute = float;
    static UNET_RT_HD float value(float x) { return x; }
    static UNET_RT_HD uint32_t non_finite(float x) {
        return (bits_as<uint32_t>(x) & 0x7f800000u) == 0x7f800000u ? 1 : 0;
    }
};
template <>
struct Pixel<double> {
    using Compute = double;
    static UNET_RT_HD double value(double x) { return x; }
    // As float32: from half a unit above its largest number on, values round to infinity.
    static UNET_RT_HD uint64_t non_finite(double x) {
        constexpr double kInfinite = 3.4028235677973366e38;
        return x < kInfinite && x > -kInfinite ? 0 : 1;
    }
};

inline bool computes_in_double(DType pixel) {
    return pixel == DType::u32 || pixel == DType::i32 || pixel == DType::f64;
}

// What the constant border becomes: the value of a pixel, normalised like every other; 0 where the constant is NaN.
inline float border_value(DType pixel, bool affine, double constant, double low, double high, double offset,
                          double divisor) {
    if (std::isnan(constant)) return 0.0f;
    if (!affine) return static_cast<float>(constant);
    if (computes_in_double(pixel)) return static_cast<float>(normalised(constant, low, high, offset, divisor));
    return normalised(static_cast<float>(constant), static_cast<float>(low), static_cast<float>(high),
                      static_cast<float>(offset), static_cast<float>(divisor));
}

UNET_RT_HD float fused_multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return std::fma(a, b, c);
#endif
}

// x / divisor, correctly rounded, with `reciprocal` the correctly rounded 1 / divisor: the first two steps give a
// quotient within one unit in the last place, from which the last two reach the nearest float32 (Markstein's theorem).
// Valid where reciprocal_serves() says so: no step then overflows, is subnormal, or turns a zero's sign.
UNET_RT_HD float quotient_by(float x, float divisor, float reciprocal) {
    float quotient = x * reciprocal;
    quotient = fused_multiply_add(fused_multiply_add(-quotient, divisor, x), reciprocal, quotient);
    return fused_multiply_add(fused_multiply_add(-quotient, divisor, x), reciprocal, quotient);
}

// Whether quotient_by() divides every normalised pixel of an integer type of at most 16 bits. All operands are zero or
// of moderate magnitude, so the difference of a (clipped) pixel and the offset is zero or at least 2^-64.
inline bool reciprocal_serves(float low, float high, float offset, float divisor) {
    constexpr float kSmall = 9.094947e-13f;  // 2^-40
    constexpr float kLarge = 1.0995116e12f;  // 2^40
    const auto moderate = [](float x) { return std::abs(x) >= kSmall && std::abs(x) <= kLarge; };
    const auto plain = [&](float x) { return bits_as<uint32_t>(x) == 0 || moderate(x); };
    return (low == -INFINITY || plain(low)) && (high == INFINITY || plain(high)) && plain(offset) && moderate(divisor);
}

}  // namespace unet_rt
