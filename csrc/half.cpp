#include "half.h"

#include <cstring>

#include "geometry.h"
#include "simd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define UNET_RT_F16C 1
#else
#define UNET_RT_F16C 0
#endif

namespace unet_rt {
namespace {

UNET_RT_SIMD void widen_portable(const char* halves, int64_t count, float* values) {
    for (int64_t i = 0; i < count; ++i) {
        half value;
        memcpy(&value, halves + i * 2, sizeof(half));
        values[i] = float_of_half(value);
    }
}

UNET_RT_SIMD void narrow_portable(const float* values, int64_t count, char* halves) {
    for (int64_t i = 0; i < count; ++i) {
        const half value = half_of_float(values[i]);
        memcpy(halves + i * 2, &value, sizeof(half));
    }
}

#if UNET_RT_F16C
// Every processor with AVX2 has F16C, and unlike "f16c" every compiler knows to ask for it.
const bool has_f16c = __builtin_cpu_supports("avx2") != 0;

// The rounding is in the instruction, which also ignores flush-to-zero for halves.
__attribute__((target("avx,f16c"))) int64_t widen_f16c(const char* halves, int64_t count, float* values) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i * 2));
        _mm256_storeu_ps(values + i, _mm256_cvtph_ps(packed));
    }
    return i;
}

__attribute__((target("avx,f16c"))) int64_t narrow_f16c(const float* values, int64_t count, char* halves) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m128i packed = _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(halves + i * 2), packed);
    }
    return i;
}
#endif

}  // namespace

void widen_row(const char* halves, int64_t count, float* values) {
    int64_t done = 0;
#if UNET_RT_F16C
    if (has_f16c) done = widen_f16c(halves, count, values);
#endif
    widen_portable(halves + done * 2, count - done, values + done);
}

void narrow_row(const float* values, int64_t count, char* halves) {
    int64_t done = 0;
#if UNET_RT_F16C
    if (has_f16c) done = narrow_f16c(values, count, halves);
#endif
    narrow_portable(values + done, count - done, halves + done * 2);
}

}  // namespace unet_rt
