/* A mask of an image of any size, tile by tile, with inference of one's own: here a filter, in your program a network.
 *
 *   segment [MASK.pgm]
 *
 * The image lies in memory as a TIFF reader leaves it: 16 bit, rows padded to 64 bytes. Four tiles at a time are gathered
 * (mirrored beyond the image, normalised), inferred, thresholded and stitched. The program ends with 0 if the mask is the
 * one that the whole image gives at once.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "unet_rt.h"

enum { HEIGHT = 700, WIDTH = 930, ROW_BYTES = (WIDTH * 2 + 63) / 64 * 64 };
enum { TILE = 256, BATCH = 4, HALO = 4 }; /* HALO: what INFER reaches beyond a sample */

static void stop(const char* what, const unet_rt_error* error) {
    fprintf(stderr, "%s: %s (code %d)\n", what, error->text, (int)error->code);
    exit(2);
}

/* Tiles (n, 1, height, width) to logits of the same shape: a sample less the mean of its 9 x 9 neighbours, zero beyond. */
static void infer(const float* tiles, int n, int height, int width, float* logits) {
    for (int k = 0; k < n; ++k)
        for (int y = 0; y < height; ++y)
            for (int x = 0; x < width; ++x) {
                const float* tile = tiles + (size_t)k * height * width;
                float sum = 0;
                for (int j = y - HALO; j <= y + HALO; ++j)
                    for (int i = x - HALO; i <= x + HALO; ++i)
                        if (j >= 0 && j < height && i >= 0 && i < width) sum += tile[(size_t)j * width + i];
                logits[((size_t)k * height + y) * width + x] = tile[(size_t)y * width + x] - sum / 81;
            }
}

static unsigned char* draw(void) {
    unsigned char* bytes = calloc(HEIGHT, ROW_BYTES);
    for (int y = 0; y < HEIGHT; ++y)
        for (int x = 0; x < WIDTH; ++x) {
            uint16_t value = (uint16_t)(900 + 500 * sin(x / 9.0) * sin(y / 7.0) + x);
            memcpy(bytes + (size_t)y * ROW_BYTES + 2 * x, &value, 2);
        }
    return bytes;
}

/* Tiles of `height` x `width` cover the image; each gives what lies HALO away from its inner edges. */
static void segment(const unet_rt_array* image, int height, int width, uint8_t* mask) {
    const double offset = 1300, divisor = 400;
    const float threshold = 0;
    float* tiles = malloc(sizeof(float) * BATCH * height * width);
    float* logits = malloc(sizeof(float) * BATCH * height * width);
    int64_t starts[2 * BATCH], sources[2 * BATCH], targets[2 * BATCH], extents[2 * BATCH];
    int n = 0;
    for (int64_t y = 0, row = 0; row < HEIGHT;) { /* row, column: the first pixel that no tile has given yet */
        int64_t bottom = y + height >= HEIGHT ? HEIGHT : y + height - HALO;
        for (int64_t x = 0, column = 0; column < WIDTH;) {
            int64_t right = x + width >= WIDTH ? WIDTH : x + width - HALO;
            starts[2 * n] = y, starts[2 * n + 1] = x;
            sources[2 * n] = row - y, sources[2 * n + 1] = column - x;
            targets[2 * n] = row, targets[2 * n + 1] = column;
            extents[2 * n] = bottom - row, extents[2 * n + 1] = right - column;
            ++n;
            column = right;
            x = right - HALO + width > WIDTH ? WIDTH - width : right - HALO; /* the last one ends with the image */
            if (n == BATCH || (bottom == HEIGHT && right == WIDTH)) {
                const int64_t tile_shape[4] = {n, 1, height, width}, mask_shape[3] = {1, HEIGHT, WIDTH};
                unet_rt_error error;
                unet_rt_gather_call gather = {.size = sizeof gather,
                                              .window = *image,
                                              .out = unet_rt_array_of(tiles, UNET_RT_F32, 4, tile_shape),
                                              .starts = starts,
                                              .offset = &offset,
                                              .divisor = &divisor};
                unet_rt_stitch_call stitch = {.size = sizeof stitch,
                                              .tiles = unet_rt_array_of(logits, UNET_RT_F32, 4, tile_shape),
                                              .out = unet_rt_array_of(mask, UNET_RT_U8, 3, mask_shape),
                                              .source_start = sources,
                                              .target_start = targets,
                                              .extent = extents,
                                              .threshold = &threshold,
                                              .op = UNET_RT_THRESHOLD};
                if (unet_rt_gather(&gather, NULL, &error)) stop("gather", &error);
                infer(tiles, n, height, width, logits);
                if (unet_rt_stitch(&stitch, &error)) stop("stitch", &error);
                n = 0;
            }
        }
        row = bottom;
        y = bottom - HALO + height > HEIGHT ? HEIGHT - height : bottom - HALO;
    }
    free(tiles);
    free(logits);
}

int main(int count, char** arguments) {
    unsigned char* bytes = draw();
    uint8_t *tiled = calloc(HEIGHT, WIDTH), *whole = calloc(HEIGHT, WIDTH);
    unet_rt_array image = {.data = bytes,
                           .dtype = UNET_RT_U16,
                           .axes = 3,
                           .shape = {1, HEIGHT, WIDTH},
                           .stride = {0, ROW_BYTES, 2}};
    size_t inside = 0, different = 0;
    unet_rt_error error;

    if (unet_rt_interface() != UNET_RT_INTERFACE) {
        fprintf(stderr, "the library has interface %d, this program %d\n", (int)unet_rt_interface(), UNET_RT_INTERFACE);
        return 2;
    }
    segment(&image, TILE, TILE, tiled);
    segment(&image, HEIGHT, WIDTH, whole);
    for (size_t i = 0; i < (size_t)HEIGHT * WIDTH; ++i) inside += tiled[i], different += tiled[i] != whole[i];
    printf("unet-rt %s: %d x %d px in tiles of %d px: %.1f %% of the mask is set, %zu pixels differ from the whole image\n",
           unet_rt_version(), HEIGHT, WIDTH, TILE, 100.0 * inside / (HEIGHT * WIDTH), different);

    /* What a call that cannot be right gets. */
    unet_rt_histogram_call wrong = {.size = sizeof wrong, .values = image};
    if (unet_rt_histogram(&wrong, &error)) printf("refused, as it should be: %s\n", error.text);

    if (count > 1) {
        FILE* file = fopen(arguments[1], "wb");
        if (file == NULL) return perror(arguments[1]), 2;
        fprintf(file, "P5 %d %d 1\n", WIDTH, HEIGHT);
        fwrite(tiled, 1, (size_t)HEIGHT * WIDTH, file);
        if (fclose(file)) return perror(arguments[1]), 2;
    }
    free(bytes), free(tiled), free(whole);
    return different != 0;
}
