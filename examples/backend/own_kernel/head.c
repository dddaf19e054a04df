/* The kernel: a 1 x 1 convolution, out[n, k, p] = bias[k] + sum over c of weight[k, c] * in[n, c, p]. Yours does more. */
#include <stdint.h>

#if defined(_WIN32)
__declspec(dllexport)
#endif
void head(const float* in, const float* weight, const float* bias, float* out, int64_t n, int64_t c, int64_t k,
          int64_t pixels) {
    for (int64_t sample = 0; sample < n; ++sample)
        for (int64_t class = 0; class < k; ++class) {
            float* to = out + (sample * k + class) * pixels;
            for (int64_t p = 0; p < pixels; ++p) to[p] = bias[class];
            for (int64_t channel = 0; channel < c; ++channel) {
                const float* from = in + (sample * c + channel) * pixels;
                const float factor = weight[class * c + channel];
                for (int64_t p = 0; p < pixels; ++p) to[p] += factor * from[p];
            }
        }
}

void* PyInit__head(void) { return 0; } /* setuptools exports it on Windows; the library is loaded by ctypes */
