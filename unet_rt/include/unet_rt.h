/* unet-rt's kernels for C, C++ and whatever calls C: tiles out of images, network outputs to their places.
 *
 * The functions of this header are what unet_rt.kernels runs in Python, with the same bits for every tile, thread
 * count, alignment and machine. Each fills arrays of the caller's, keeps nothing, and may be called from several
 * threads.
 *
 *   unet_rt_array image = unet_rt_array_of(pixels, UNET_RT_U8, 3, (int64_t[]){1, height, width});
 *   unet_rt_gather_call call = {.size = sizeof call, .window = image, .out = tiles, .starts = starts};
 *   unet_rt_error error;
 *   if (unet_rt_gather(&call, NULL, &error)) fprintf(stderr, "%s\n", error.text);
 *
 * Arguments are checked before anything is written: shapes, dtypes, strides, coordinates, overlap. A call that is
 * refused returns a code and says in words why; it writes nothing. What cannot be checked is that the memory behind a
 * pointer is there.
 *
 * Compatibility: within one UNET_RT_INTERFACE nothing is taken away and nothing changes its meaning. Structs of calls
 * may get further fields at their ends, whose zeros mean what was before; `size` says how much of it the caller knows.
 */
#ifndef UNET_RT_H
#define UNET_RT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#if defined(UNET_RT_BUILDS)
#define UNET_RT_API __declspec(dllexport)
#else
#define UNET_RT_API __declspec(dllimport)
#endif
#elif defined(__GNUC__)
#define UNET_RT_API __attribute__((visibility("default")))
#else
#define UNET_RT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define UNET_RT_INTERFACE 1 /* of this header */

/* The interface that the loaded library has; a program whose UNET_RT_INTERFACE differs must not call the rest. */
UNET_RT_API int32_t unet_rt_interface(void);

/* The library's version, e.g. "0.1.0". */
UNET_RT_API const char* unet_rt_version(void);

/* ------------------------------------------------------------------------------------------------------------- errors
 */

enum {
    UNET_RT_OK = 0,
    UNET_RT_BAD_CALL = 1,   /* a null pointer, a struct of unknown size, an unknown code, misaligned tables */
    UNET_RT_BAD_DTYPE = 2,  /* an array has a dtype that the function does not take */
    UNET_RT_BAD_SHAPE = 3,  /* shapes do not fit each other, or strides reach beyond what can be addressed */
    UNET_RT_BAD_PLACE = 4,  /* a part leaves its tile, its output or its window */
    UNET_RT_BAD_NUMBER = 5, /* a normalisation, threshold or value that cannot be applied */
    UNET_RT_OVERLAP = 6,    /* an output shares memory with another array or with itself, or parts share a place */
    UNET_RT_NO_MEMORY = 7,
    UNET_RT_NO_DEVICE = 8, /* CUDA: none is there, arrays lie elsewhere, or a launch failed */
    UNET_RT_INTERNAL = 9   /* a mistake of this library's */
};

/* Why a call was refused, for people. Every function takes one, or NULL. */
typedef struct unet_rt_error {
    int32_t code; /* as returned */
    char text[508];
} unet_rt_error;

/* ------------------------------------------------------------------------------------------------------------- arrays
 */

typedef enum unet_rt_dtype {
    UNET_RT_U8 = 0, /* booleans, too */
    UNET_RT_I8 = 1,
    UNET_RT_U16 = 2,
    UNET_RT_I16 = 3,
    UNET_RT_U32 = 4,
    UNET_RT_I32 = 5,
    UNET_RT_F16 = 6,
    UNET_RT_F32 = 7,
    UNET_RT_F64 = 8
} unet_rt_dtype;

/* Memory of the caller's. Strides are in bytes; those of what is read may be negative, zero or odd. Any alignment will
 * do. D below is the number of spatial axes, 1 to 3: (Y, X) for images, (Z, Y, X) for volumes. */
typedef struct unet_rt_array {
    void* data;
    int32_t dtype; /* unet_rt_dtype */
    int32_t axes;
    int64_t shape[5];
    int64_t stride[5];
} unet_rt_array;

/* An array whose elements follow each other in C order. */
static inline unet_rt_array unet_rt_array_of(void* data, int32_t dtype, int32_t axes, const int64_t* shape) {
    static const int64_t bytes[9] = {1, 1, 2, 2, 4, 4, 2, 4, 8};
    int64_t stride = dtype >= 0 && dtype < 9 ? bytes[dtype] : 0;
    unet_rt_array array;
    int32_t axis;
    memset(&array, 0, sizeof array);
    array.data = data;
    array.dtype = dtype;
    array.axes = axes;
    for (axis = axes < 5 ? axes - 1 : 4; axis >= 0; --axis) {
        array.shape[axis] = shape[axis];
        array.stride[axis] = stride;
        stride = (int64_t)((uint64_t)stride * (uint64_t)shape[axis]);
    }
    return array;
}

/* -------------------------------------------------------------------------------------------------------------- calls
 */

typedef enum unet_rt_border {
    UNET_RT_MIRROR = 0, /* as often as it takes, the edge pixel once: 2 1 | 0 1 2 | 1 0 */
    UNET_RT_EDGE = 1,
    UNET_RT_CONSTANT = 2
} unet_rt_border;

typedef enum unet_rt_op {
    UNET_RT_COPY = 0,
    UNET_RT_SOFTMAX = 1, /* over K */
    UNET_RT_SIGMOID = 2,
    UNET_RT_ARGMAX = 3,   /* the first maximum, or the first NaN over everything */
    UNET_RT_THRESHOLD = 4 /* met by values above it, never by NaN */
} unet_rt_op;

/* In every struct: `size` is its sizeof. `threads` is the most threads to use, 0: as many as the process may run on.
 * `tables_on_device` is for the CUDA functions: tables (N, D) are then int64 arrays on the device, which nobody can
 * check before the kernel runs: a pixel outside the window becomes the nearest that it holds, a part outside its tile
 * or its output is left out. */

/* out[n, c, t] = (clip(image[c, border(starts[n] + t)], low[c], high[c]) - offset[c]) / divisor[c], in float32 (from
 * 32-bit integers and float64 in float64, rounded once). */
typedef struct unet_rt_gather_call {
    size_t size;
    unet_rt_array window;        /* (C, *spatial), any dtype: pixels of the image */
    unet_rt_array out;           /* (N, C, *tile), float32 or float16 */
    const int64_t* starts;       /* (N, D) image pixels, within +-2^48; tiles may lie outside the image on any side */
    const int64_t* image_shape;  /* (D,) pixels of the whole image; NULL: the window is the image */
    const int64_t* window_start; /* (D,) image pixel of the window's first; NULL: 0 */
    const double* offset;        /* (C,), float32 range; NULL with divisor: pixels are converted and nothing else */
    const double* divisor;       /* (C,), normal float32 numbers, not 0 */
    const double* low;           /* (C,), -INFINITY: no bound; NULL with high: no clip */
    const double* high;          /* (C,) */
    double constant; /* raw pixel value of the constant border, normalised like every pixel; NaN: 0 in the tile */
    int32_t border;  /* unet_rt_border */
    int32_t threads;
    int32_t tables_on_device;
    int32_t reserved; /* 0 */
} unet_rt_gather_call;

/* *non_finite, where not NULL: the number of NaN and infinite pixels read, as often as tiles hold them. */
UNET_RT_API int32_t unet_rt_gather(const unet_rt_gather_call* call, int64_t* non_finite, unet_rt_error* error);

/* out[.., target_start[n] + j] = op(tiles[n, :, source_start[n] + j]) for 0 <= j < extent[n]. */
typedef struct unet_rt_stitch_call {
    size_t size;
    unet_rt_array tiles;         /* (N, K, *tile), float32 or float16 */
    unet_rt_array out;           /* copy, softmax, sigmoid: (K, *spatial) float32; threshold: (K, *spatial) uint8;
                                    argmax: (*spatial) uint8 */
    const int64_t* source_start; /* (N, D) samples of the tile */
    const int64_t* target_start; /* (N, D) samples of out; the parts may not share a place */
    const int64_t* extent;       /* (N, D) samples */
    const float* threshold;      /* (K,), for threshold alone */
    const uint8_t* values;       /* argmax: (K,) value of each class, NULL: 0, 1, ...; threshold: (2,) value below and
                                    above, NULL: 0 and 1 */
    int32_t op;                  /* unet_rt_op */
    int32_t threads;
    int32_t tables_on_device;
    int32_t reserved;
} unet_rt_stitch_call;

UNET_RT_API int32_t unet_rt_stitch(const unet_rt_stitch_call* call, unet_rt_error* error);

/* total[k, target_start[n] + j] += weight[source_start[n] + j] * tiles[n, k, source_start[n] + j], and weight_total
 * += weight, tile after tile; parts may share places. */
typedef struct unet_rt_blend_call {
    size_t size;
    unet_rt_array tiles;         /* (N, K, *tile), float32 or float16 */
    unet_rt_array weight;        /* (*tile), float32 */
    unet_rt_array total;         /* (K, *spatial), float32, added to */
    unet_rt_array weight_total;  /* (*spatial), float32, added to */
    const int64_t* source_start; /* (N, D) */
    const int64_t* target_start; /* (N, D) */
    const int64_t* extent;       /* (N, D) */
    int32_t threads;
    int32_t tables_on_device;
} unet_rt_blend_call;

UNET_RT_API int32_t unet_rt_blend(const unet_rt_blend_call* call, unet_rt_error* error);

/* out = op(total / weight_total). */
typedef struct unet_rt_finish_call {
    size_t size;
    unet_rt_array total;        /* (K, *spatial), float32 */
    unet_rt_array weight_total; /* (*spatial), float32 */
    unet_rt_array out;          /* as for unet_rt_stitch */
    const float* threshold;     /* as for unet_rt_stitch */
    const uint8_t* values;      /* as for unet_rt_stitch */
    int32_t op;
    int32_t threads;
} unet_rt_finish_call;

/* *uncovered, where not NULL: samples without weight. They are NaN, the first class, or the value below the threshold.
 */
UNET_RT_API int32_t unet_rt_blend_finish(const unet_rt_finish_call* call, int64_t* uncovered, unet_rt_error* error);

/* The skip connection of a U-Net: out[n, c] = skip[n, c, offset ...] for c < C1, out[n, C1 + c] = up[n, c]. */
typedef struct unet_rt_concat_call {
    size_t size;
    unet_rt_array skip;    /* (N, C1, *spatial), uint8, int8, float16 or float32 */
    unet_rt_array up;      /* (N, C2, *spatial of out), same dtype */
    unet_rt_array out;     /* (N, C1 + C2, *spatial), same dtype */
    const int64_t* offset; /* (D,) first sample of the window in skip; NULL: centred, odd differences rounded down */
    int32_t threads;
    int32_t reserved;
} unet_rt_concat_call;

UNET_RT_API int32_t unet_rt_crop_concat(const unet_rt_concat_call* call, unet_rt_error* error);

/* counts[v] += number of values equal to v. */
typedef struct unet_rt_histogram_call {
    size_t size;
    unet_rt_array values; /* uint8 or uint16 of any shape, in C order */
    int64_t* counts;      /* (256,) or (65536,) */
    int32_t threads;
    int32_t reserved;
} unet_rt_histogram_call;

UNET_RT_API int32_t unet_rt_histogram(const unet_rt_histogram_call* call, unet_rt_error* error);

/* --------------------------------------------------------------------------------------------------------------- CUDA
 */

/* In the library unet_rt_cuda, where it was built (the CMake target unet_rt::cuda exists then). The same calls for
 * arrays on one CUDA device, enqueued on `stream` (a cudaStream_t; NULL: the default one): nothing is allocated there
 * or waited for, and the arrays must stay until the kernel has run. Tables on the host travel in the launch. Counters
 * are uint64 on the device, added to once the kernel has run, or NULL. `threads` means nothing. */

/* NULL where kernels can run, else why not, in words that stay valid until the calling thread asks again. */
UNET_RT_API const char* unet_rt_cuda_missing(void);

UNET_RT_API int32_t unet_rt_cuda_gather(const unet_rt_gather_call* call, uint64_t* non_finite, void* stream,
                                        unet_rt_error* error);
UNET_RT_API int32_t unet_rt_cuda_stitch(const unet_rt_stitch_call* call, void* stream, unet_rt_error* error);
UNET_RT_API int32_t unet_rt_cuda_blend(const unet_rt_blend_call* call, void* stream, unet_rt_error* error);
UNET_RT_API int32_t unet_rt_cuda_blend_finish(const unet_rt_finish_call* call, uint64_t* uncovered, void* stream,
                                              unet_rt_error* error);
UNET_RT_API int32_t unet_rt_cuda_crop_concat(const unet_rt_concat_call* call, void* stream, unet_rt_error* error);

#ifdef __cplusplus
}
#endif

#endif
