// The steps of a network that cuDNN's convolutions leave over, on float16 arrays whose channels are adjacent.
//
// Contracts: a Map is a window of such an array, its address and strides multiples of 16 bytes and its channels a
// multiple of 8. Sums are in float32 and rounded once. Each function enqueues on `stream` and returns: nothing is
// allocated, nothing waited for. Inputs and outputs of a network are planar (N, C, Y, X), C-contiguous.
#pragma once

#include <cstdint>

#include "launch.h"

namespace unet_rt::cuda {

struct Map {
    char* data;
    int64_t stride_n, stride_y, stride_x;  // bytes
};

enum class Activation : int { none, relu, sigmoid, softmax };  // softmax: over the channels

constexpr int kMostHeadWeights = 768;
constexpr int kMostHeadFilters = 8;

// out[n, y, x, c] = planar[n, c, y, x]; channels up to a multiple of 8 are zero.
void steps_enter(const char* planar, bool wide, int64_t n, int64_t channels, int64_t y, int64_t x, const Map& out,
                 Stream stream);

// 3 x 3 convolution of few planar channels, bias and, if asked, ReLU. weights: (channels, 3, 3, filters) float32.
// (y, x): size of `out`; before: zero padding above and left.
void steps_first(const char* planar, bool wide, int64_t n, int64_t channels, int64_t in_y, int64_t in_x,
                 int64_t before_y, int64_t before_x, const float* weights, const float* bias, int64_t filters,
                 bool relu, const Map& out, int64_t y, int64_t x, Stream stream);

// out = the largest of each 2 x 2 window of `from`, which has (y, x) samples; a last odd row or column is left out. NaN
// stays NaN. With crop.data: crop = from[start_y : start_y + crop_y, start_x : start_x + crop_x], in the same pass.
void steps_pool(const Map& from, int64_t n, int64_t y, int64_t x, int64_t channels, const Map& out, const Map& crop,
                int64_t start_y, int64_t start_x, int64_t crop_y, int64_t crop_x, Stream stream);

// out = act(a + b), or act(a) without b.data; act(v) = v, for v < 0 slope * v. In place is allowed. slope 1: a copy.
void steps_add(const Map& a, const Map& b, const Map& out, int64_t n, int64_t y, int64_t x, int64_t channels,
               float slope, Stream stream);

// out is `factor` times as large as from (y, x), each axis; linear: half-pixel centres, edge samples repeated.
void steps_resize(const Map& from, const Map& out, int64_t n, int64_t y, int64_t x, int64_t channels, int64_t factor,
                  bool linear, Stream stream);

// planar[n, k, y, x] = act(sum of weights[k, c] * from[n, y, x, c] + bias[k]); weights (filters, channels) on the host,
// at most kMostHeadWeights and kMostHeadFilters.
void steps_head(const Map& from, int64_t n, int64_t y, int64_t x, int64_t channels, const float* weights,
                const float* bias, int64_t filters, Activation act, char* planar, Stream stream);

// planar[n, k, y, x] = act(from[n, y, x, k]), k < filters.
void steps_leave(const Map& from, int64_t n, int64_t y, int64_t x, int64_t filters, Activation act, char* planar,
                 Stream stream);

// For trials of convolutions. block[k] = a float16 number in [-1, 1] that depends on k alone; bytes: a multiple of 16.
void steps_fill(char* block, int64_t bytes, Stream stream);

// Of a convolution: sample (i, j) of the output begins at sample (i * stride_y - before_y, ...) of the input.
struct Window {
    int64_t kernel_y, kernel_x, stride_y, stride_x, dilation_y, dilation_x, before_y, before_x;
};

// Adds to *count how many values of `out` are not convolution(from) + bias, with ReLU if asked: further from it than
// sums in float32, in whatever order, and one rounding bring them. weights: (filters, kernel_y, kernel_x, channels),
// bias: (filters,) or null, all float16; (y, x): size of `from`, zeros around it.
void steps_count_wrong(const Map& from, int64_t n, int64_t y, int64_t x, int64_t channels, const Window& window,
                       const char* weights, const char* bias, int64_t filters, bool relu, const Map& out, int64_t out_y,
                       int64_t out_x, uint64_t* count, Stream stream);

// Adds to *count how many values of the block, outside of `out`, are not what steps_fill put there.
void steps_count_beside(const char* block, int64_t bytes, const Map& out, int64_t n, int64_t y, int64_t x,
                        int64_t channels, uint64_t* count, Stream stream);

}  // namespace unet_rt::cuda
