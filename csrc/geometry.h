// Arithmetic shared by the CPU and the CUDA kernels: where a pixel comes from, and what becomes of its value.
//
// Everything here gives the same bits on every machine, tile, alignment and vector width: single IEEE operations in a
// fixed order, compiled without contraction into fused multiply-adds (-ffp-contract=off, -fmad=false), and no libm.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define UNET_RT_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define UNET_RT_HD __forceinline
#else
#define UNET_RT_HD inline __attribute__((always_inline))
#endif

namespace unet_rt {

enum class Border : int { mirror, edge, constant };

// Image pixel that stands for pixel `i` of an axis of `size` pixels; -1 where the border is a constant.
// mirror is NumPy's "reflect", as often as it takes: size 4 gives ... 2 1 | 0 1 2 3 | 2 1 0 1 ...; size 1 gives 0.
UNET_RT_HD int64_t border_index(int64_t i, int64_t size, Border border) {
    if (i >= 0 && i < size) return i;
    if (border == Border::constant) return -1;
    if (border == Border::edge) return i < 0 ? 0 : size - 1;
    if (i < 0 && i > -size) return -i;  // one reflection, as nearly always, without a division
    if (i >= size && i < 2 * size - 1) return 2 * (size - 1) - i;
    if (size == 1) return 0;
    const int64_t period = 2 * (size - 1);
    int64_t phase = i % period;
    if (phase < 0) phase += period;
    return phase < size ? phase : period - phase;
}

// First sample of the centred window of `small` samples out of `large` (572 of 588: 8; odd differences round down).
UNET_RT_HD int64_t centre_offset(int64_t large, int64_t small) { return (large - small) / 2; }

template <class To, class From>
UNET_RT_HD To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To result;
    memcpy(&result, &value, sizeof(To));
    return result;
}

// A half is carried as its bits. Conversions are branch-free selects on integers, so that they vectorise, and never
// touch a subnormal float, so that a caller's flush-to-zero mode changes nothing. NaN is as x86 has it: quiet, with the
// upper bits of its payload.
struct half {
    uint16_t bits;
};

UNET_RT_HD float float_of_half(half h) {
    const uint32_t magnitude = static_cast<uint32_t>(h.bits & 0x7fffu) << 13;
    const uint32_t exponent = magnitude & 0x0f800000u;
    const uint32_t normal = magnitude + (112u << 23);
    const uint32_t quiet = magnitude > 0x0f800000u ? 0x00400000u : 0u;
    const uint32_t special = (magnitude + (224u << 23)) | quiet;  // infinity and NaN
    const uint32_t tiny = bits_as<uint32_t>(bits_as<float>(magnitude + (113u << 23)) - bits_as<float>(113u << 23));
    const uint32_t value = exponent == 0x0f800000u ? special : (exponent == 0 ? tiny : normal);
    return bits_as<float>(value | (static_cast<uint32_t>(h.bits & 0x8000u) << 16));
}

// Round to nearest, ties to even; from 65520 on infinity.
UNET_RT_HD half half_of_float(float value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t special = magnitude > 0x7f800000u ? (((magnitude >> 13) & 0x3ffu) | 0x7e00u) : 0x7c00u;
    // Adding 0.5 leaves the value, rounded to steps of 2^-24, in the low mantissa bits.
    const uint32_t below = magnitude < 0x38800000u ? magnitude : 0u;  // 2^-14, the smallest normal half
    const uint32_t tiny = bits_as<uint32_t>(bits_as<float>(below) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t result = magnitude >= 0x47800000u ? special : (magnitude < 0x38800000u ? tiny : normal);
    return half{static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u))};
}

// NaN passes: both comparisons are false.
template <class T>
UNET_RT_HD T clipped(T x, T low, T high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

template <class T>
UNET_RT_HD T normalised(T x, T low, T high, T offset, T divisor) {
    return (clipped(x, low, high) - offset) / divisor;
}

// exp(x) in float32 by 2^n * p(r), |r| <= ln(2) / 2, p the Taylor polynomial of degree 7 in Horner form: 2 ulp where
// the result is normal (tests/test_kernels.py measures it), monotonic enough for a softmax and the same everywhere,
// which libm's is not. Below -104 it is 0, above 88.8 infinity; NaN stays NaN.
UNET_RT_HD float exp_f32(float x) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
    x = clipped(x, -104.5f, 89.5f);
    const float shifted = x * 1.44269504f + kMagic;
    const float n = shifted - kMagic;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln(2) in two parts: n * the first is exact
    float p = 1.98412698e-4f;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    // 2^n in two factors, since 2^-150 and 2^129 are no normal floats.
    const int32_t k = bits_as<int32_t>(shifted) - bits_as<int32_t>(kMagic);
    const int32_t first = k >> 1;
    const int32_t second = k - first;
    const float low = bits_as<float>(static_cast<int32_t>(static_cast<uint32_t>(first + 127) << 23));
    const float high = bits_as<float>(static_cast<int32_t>(static_cast<uint32_t>(second + 127) << 23));
    return p * low * high;
}

// 1 / (1 + exp(-x)) without overflow, and with full relative precision in the lower tail.
UNET_RT_HD float sigmoid_f32(float x) {
    const float e = exp_f32(x < 0.0f ? x : -x);
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// Whether a later class takes the argmax over from the best so far: the first maximum wins, and the first NaN wins
// over everything, as in NumPy.
UNET_RT_HD bool takes_over(float value, float best) { return !(value <= best) && best == best; }

}  // namespace unet_rt
