// How the CUDA kernels are started, and what their bodies share.
//
// A kernel is a body: a struct of plain values whose operator() is one thread's work. nvcc makes a __global__ function
// of it; an ordinary C++ compiler runs all its blocks and threads in loops (module _cuda_host of the test environment),
// where misaligned vector accesses are errors. So bodies use no barriers, shared memory or shuffles. A body is the
// launch's one parameter and stays below the 4 kB that every architecture takes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "array.h"
#include "geometry.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include <functional>
#include <typeinfo>
#endif

// Of the loop that follows, in device code.
#if defined(__CUDA_ARCH__)
#define UNET_RT_UNROLL _Pragma("unroll")
#define UNET_RT_UNROLL_TWICE _Pragma("unroll 2")
#define UNET_RT_ROLLED _Pragma("unroll 1")
#else
#define UNET_RT_UNROLL
#define UNET_RT_ROLLED
#define UNET_RT_UNROLL_TWICE
#endif

namespace unet_rt::cuda {

using Stream = void*;  // a cudaStream_t

constexpr uint32_t kThreads = 256;
constexpr int kRows = 4;                // per thread, where rows are independent: what it takes to get there is shared
constexpr int64_t kMostBlocks = 65535;  // along y and z
constexpr int kTilesPerLaunch = 64;     // whose tables travel in the launch's parameters

// Where a thread stands.
struct Place {
    uint32_t block_x, block_y, block_z;
    uint32_t blocks_y;
    uint32_t thread;
};

struct Grid {
    int64_t x = 1, y = 1, z = 1;  // blocks
};

// Throws for a CUDA error code other than 0 (runtime_cuda.cpp).
void check(int code, const char* action);

// Blocks that a multiprocessor must have room for: a body's kBlocks; at most 4, the 1024 threads of the smallest one.
template <class Body>
constexpr int blocks_of(decltype(Body::kBlocks)) {
    return Body::kBlocks;
}
template <class Body>
constexpr int blocks_of(...) {
    return 1;
}

#if defined(__CUDACC__)
template <class Body>
__global__ void __launch_bounds__(kThreads, blocks_of<Body>(0)) run(const __grid_constant__ Body body) {
    body(Place{blockIdx.x, blockIdx.y, blockIdx.z, gridDim.y, threadIdx.x});
}

template <class Body>
void launch(const Grid& grid, Stream stream, const Body& body) {
    static_assert(sizeof(Body) <= 4096, "more parameters than a launch takes");
    if (grid.x < 1 || grid.y < 1 || grid.z < 1) return;
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(std::min(grid.y, kMostBlocks)),
                      static_cast<unsigned>(grid.z));
    run<Body><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(body);
    check(cudaGetLastError(), "launching a kernel");
}
#else
// Takes launches in place of the loops below where a test has set one (tests/ptx.py).
using Launcher = std::function<void(const std::type_info& body_type, const Grid& grid, const void* body, size_t bytes)>;
inline Launcher launcher;

template <class Body>
void launch(const Grid& grid, Stream, const Body& body) {
    static_assert(sizeof(Body) <= 4096, "more parameters than a launch takes");
    if (launcher) return launcher(typeid(Body), grid, &body, sizeof(Body));
    const auto rows = static_cast<uint32_t>(std::min<int64_t>(grid.y, 3));  // fewer than there are: bodies must loop
    for (uint32_t z = 0; z < grid.z; ++z)
        for (uint32_t y = 0; y < rows; ++y)
            for (uint32_t x = 0; x < grid.x; ++x)
                for (uint32_t thread = 0; thread < kThreads; ++thread) body(Place{x, y, z, rows, thread});
}
#endif

// Division of numbers below 2^31 by a number that the host knows: a multiplication and a shift.
struct Divider {
    uint32_t divisor = 1;
    uint32_t multiplier = 1;
    uint32_t shift = 0;

    Divider() = default;
    explicit Divider(int64_t by) {
        if (by < 1 || by > INT32_MAX) throw std::length_error("more than 2^31 rows, columns or planes in one array");
        divisor = static_cast<uint32_t>(by);
        while ((uint64_t{1} << shift) < divisor) ++shift;
        multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - divisor) << 32) / divisor + 1);
    }

    UNET_RT_HD uint32_t quotient(uint32_t x) const {
#if defined(__CUDA_ARCH__)
        return (__umulhi(x, multiplier) + x) >> shift;
#else
        return (static_cast<uint32_t>((static_cast<uint64_t>(x) * multiplier) >> 32) + x) >> shift;
#endif
    }
};

// ------------------------------------------------------------------------------------------------------------- tables

// (N, 3) coordinates: by value, or (N, axes) where they lie on the device. Int: wide enough for those by value.
template <class Int>
struct Table {
    const int64_t* device;
    int32_t axes;
    int32_t missing;  // value of the axes that a table of fewer than three lacks
    Int rows[kTilesPerLaunch][3];

    UNET_RT_HD int64_t at(uint32_t n, int axis) const {
        if (device == nullptr) return rows[n][axis];
        const int column = axis - (3 - axes);
        return column < 0 ? missing : device[static_cast<int64_t>(n) * axes + column];
    }
};

// A table on the device; data is null for one on the host.
struct DeviceTable {
    const int64_t* data = nullptr;
    int axes = 0;
};

// `count` rows from row `first` on, of a table on the host (with three columns) or on the device.
template <class Int>
Table<Int> table_of(const int64_t* host, const DeviceTable& device, int32_t missing, int64_t first, int64_t count) {
    Table<Int> table{};
    table.axes = device.axes;
    table.missing = missing;
    if (device.data != nullptr) {
        table.device = device.data + first * device.axes;
        return table;
    }
    for (int64_t i = 0; i < 3 * count; ++i) {
        const int64_t value = host[3 * first + i];
        if (value != static_cast<Int>(value)) throw std::length_error("more than 2^31 samples along an axis");
        table.rows[i / 3][i % 3] = static_cast<Int>(value);
    }
    return table;
}

// ---------------------------------------------------------------------------------------------------- loads and stores

UNET_RT_HD uint64_t address_of(const void* p) { return reinterpret_cast<uintptr_t>(p); }

#if defined(__CUDA_ARCH__)
// Memory that no thread of the launch writes.
UNET_RT_HD uint4 read_only(const uint4* p) { return __ldg(p); }
UNET_RT_HD uint2 read_only(const uint2* p) { return __ldg(p); }
UNET_RT_HD uint32_t read_only(const uint32_t* p) { return __ldg(p); }
UNET_RT_HD uint16_t read_only(const uint16_t* p) { return __ldg(p); }
UNET_RT_HD uint8_t read_only(const uint8_t* p) { return __ldg(p); }
#else
template <class T>
T read_only(const T* p) {
    T value;
    memcpy(&value, p, sizeof(T));
    return value;
}
inline void require_aligned(const void* p, uint64_t bytes) {
    if (address_of(p) % bytes != 0) throw std::logic_error("a kernel made a misaligned vector access");
}
#endif

// kWords words (1, 2 or a multiple of 4) from an address that is a multiple of as many bytes (at most 16).
template <int kWords>
UNET_RT_HD void load_aligned(const char* from, uint32_t* words) {
#if defined(__CUDA_ARCH__)
    if constexpr (kWords == 1) {
        words[0] = read_only(reinterpret_cast<const uint32_t*>(from));
    } else if constexpr (kWords == 2) {
        const uint2 two = read_only(reinterpret_cast<const uint2*>(from));
        words[0] = two.x, words[1] = two.y;
    } else {
        UNET_RT_UNROLL
        for (int i = 0; i < kWords; i += 4) {
            const uint4 four = read_only(reinterpret_cast<const uint4*>(from + 4 * i));
            words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
        }
    }
#else
    require_aligned(from, std::min(4 * kWords, 16));
    memcpy(words, from, 4 * kWords);
#endif
}

// kWords words from any address: the aligned words that hold them, shifted. Every one of those holds a byte of them.
template <int kWords>
UNET_RT_HD void load_shifted(const char* from, uint32_t* words) {
    const auto excess = static_cast<uint32_t>(address_of(from)) % 4;
    const char* const base = from - excess;
    uint32_t held[kWords + 1];
    UNET_RT_UNROLL
    for (int i = 0; i < kWords; ++i) load_aligned<1>(base + 4 * i, held + i);
    load_aligned<1>(base + (excess == 0 ? 4 * kWords - 4 : 4 * kWords), held + kWords);
    UNET_RT_UNROLL
    for (int i = 0; i < kWords; ++i) {
#if defined(__CUDA_ARCH__)
        words[i] = __funnelshift_r(held[i], held[i + 1], 8 * excess);
#else
        words[i] = static_cast<uint32_t>((static_cast<uint64_t>(held[i + 1]) << 32 | held[i]) >> 8 * excess);
#endif
    }
}

// 1, 2 or 4 bytes, or a multiple of 4, from any address, in the widest pieces that its alignment allows. The branches
// depend on the row alone where rows are cut into vectors of kBytes: a warp takes one of them.
template <int kBytes>
UNET_RT_HD void load_bytes(const char* from, void* to) {
    static_assert(kBytes == 1 || kBytes == 2 || kBytes % 4 == 0, "unsupported size");
    const auto alignment = static_cast<uint32_t>(address_of(from));
    if constexpr (kBytes == 1) {
        *static_cast<uint8_t*>(to) = read_only(reinterpret_cast<const uint8_t*>(from));
    } else if constexpr (kBytes == 2) {
        uint16_t pair;
        if (alignment % 2 == 0) {
            pair = read_only(reinterpret_cast<const uint16_t*>(from));
        } else {
            const auto* bytes = reinterpret_cast<const uint8_t*>(from);
            pair = static_cast<uint16_t>(read_only(bytes) | read_only(bytes + 1) << 8);
        }
        memcpy(to, &pair, 2);
    } else {
        constexpr int kWords = kBytes / 4;
        uint32_t words[kWords];
        if (kWords % 4 == 0 && alignment % 16 == 0) {
            if constexpr (kWords % 4 == 0) load_aligned<kWords>(from, words);
        } else if (kWords % 2 == 0 && alignment % 8 == 0) {
            UNET_RT_UNROLL
            for (int i = 0; i + 1 < kWords; i += 2) load_aligned<2>(from + 4 * i, words + i);
        } else if (alignment % 4 == 0) {
            UNET_RT_UNROLL
            for (int i = 0; i < kWords; ++i) load_aligned<1>(from + 4 * i, words + i);
        } else {
            load_shifted<kWords>(from, words);
        }
        memcpy(to, words, kBytes);
    }
}

// kBytes (a multiple of 4) from each of kRowCount addresses, whose bits are united in `alignment`: the way is chosen
// once, so that all loads are under way together. Rows that are not `wanted` are left out.
template <int kBytes, int kRowCount>
UNET_RT_HD void load_rows(const char* const (&from)[kRowCount], const bool (&wanted)[kRowCount], uint64_t alignment,
                          uint32_t (&words)[kRowCount][kBytes / 4]) {
    constexpr int kWords = kBytes / 4;
    if (alignment % (kBytes < 16 ? kBytes : 16) == 0) {
        UNET_RT_UNROLL
        for (int r = 0; r < kRowCount; ++r)
            if (wanted[r]) load_aligned<kWords>(from[r], words[r]);
    } else if (kWords % 4 == 0 && alignment % 8 == 0) {
        if constexpr (kWords % 4 == 0) {
            UNET_RT_UNROLL
            for (int r = 0; r < kRowCount; ++r) {
                if (!wanted[r]) continue;
                UNET_RT_UNROLL
                for (int i = 0; i < kWords; i += 2) load_aligned<2>(from[r] + 4 * i, words[r] + i);
            }
        }
    } else if (kWords > 1 && alignment % 4 == 0) {
        UNET_RT_UNROLL
        for (int r = 0; r < kRowCount; ++r) {
            if (!wanted[r]) continue;
            UNET_RT_UNROLL
            for (int i = 0; i < kWords; ++i) load_aligned<1>(from[r] + 4 * i, words[r] + i);
        }
    } else {
        UNET_RT_UNROLL
        for (int r = 0; r < kRowCount; ++r)
            if (wanted[r]) load_shifted<kWords>(from[r], words[r]);
    }
}

// One element from any address.
template <class T>
UNET_RT_HD T load_one(const char* from) {
    T value;
    load_bytes<sizeof(T)>(from, &value);
    return value;
}

// kCount elements, `stride` bytes apart.
template <class T, int kCount>
UNET_RT_HD void load_many(const char* from, int64_t stride, T (&values)[kCount]) {
    if (stride == static_cast<int64_t>(sizeof(T))) {
        load_bytes<kCount* static_cast<int>(sizeof(T))>(from, values);
    } else {
        UNET_RT_UNROLL
        for (int i = 0; i < kCount; ++i) values[i] = load_one<T>(from + i * stride);
    }
}

// An element to any address.
//
// On a device the whole store is spelled out. Left to itself the compiler finds that both branches write the same bytes
// and writes all values byte by byte; for the low byte of a binary16 that was just converted the assembler (ptxas 13.0)
// then makes a conversion to integer, and the byte is lost. tests/test_kernels_compiled.py looks for that.
#if defined(__CUDA_ARCH__)
UNET_RT_HD void store_whole(char* to, uint8_t value) { *reinterpret_cast<uint8_t*>(to) = value; }
UNET_RT_HD void store_whole(char* to, uint16_t value) { __stwb(reinterpret_cast<unsigned short*>(to), value); }
UNET_RT_HD void store_whole(char* to, uint32_t value) { __stwb(reinterpret_cast<unsigned int*>(to), value); }
UNET_RT_HD void store_whole(char* to, float value) { __stwb(reinterpret_cast<float*>(to), value); }
#endif

template <class T>
UNET_RT_HD void store_one(char* to, T value) {
#if defined(__CUDA_ARCH__)
    if (address_of(to) % sizeof(T) == 0) {
        store_whole(to, value);
        return;
    }
#endif
    memcpy(to, &value, sizeof(T));
}

// kBytes (4, 8 or 16) to an address that is a multiple of them.
template <int kBytes>
UNET_RT_HD void store_aligned(char* to, const void* from) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "unsupported size");
#if defined(__CUDA_ARCH__)
    uint32_t words[kBytes / 4];
    memcpy(words, from, kBytes);
    if constexpr (kBytes == 4) *reinterpret_cast<uint32_t*>(to) = words[0];
    if constexpr (kBytes == 8) *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    if constexpr (kBytes == 16) *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
#else
    require_aligned(to, kBytes);
    memcpy(to, from, kBytes);
#endif
}

// The bits of float_of_half() and half_of_float(), but for the payload of NaN, by the device's instructions.
UNET_RT_HD float widened(half h) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(h.bits));
#else
    return float_of_half(h);
#endif
}
UNET_RT_HD float widened(float value) { return value; }

UNET_RT_HD half narrowed(float value) {
#if defined(__CUDA_ARCH__)
    return half{__half_as_ushort(__float2half_rn(value))};
#else
    return half_of_float(value);
#endif
}

// kCount results to adjacent, aligned places.
template <int kCount>
UNET_RT_HD void store_results(char* to, const float (&values)[kCount], float*) {
    store_aligned<kCount * 4>(to, values);
}
template <int kCount>
UNET_RT_HD void store_results(char* to, const uint8_t (&values)[kCount], uint8_t*) {
    store_aligned<kCount>(to, values);
}
template <int kCount>
UNET_RT_HD void store_results(char* to, const float (&values)[kCount], half*) {
    uint32_t words[kCount / 2];
    UNET_RT_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(words[i]) : "f"(values[2 * i + 1]), "f"(values[2 * i]));
#else
        words[i] = narrowed(values[2 * i]).bits | static_cast<uint32_t>(narrowed(values[2 * i + 1]).bits) << 16;
#endif
    }
    store_aligned<kCount * 2>(to, words);
}
UNET_RT_HD void store_result(char* to, float value, float*) { store_one(to, value); }
UNET_RT_HD void store_result(char* to, uint8_t value, uint8_t*) { store_one(to, value); }
UNET_RT_HD void store_result(char* to, float value, half*) { store_one(to, narrowed(value).bits); }

// Hides from the compiler where a value came from: it computes some anew in every turn of a loop rather than keep them.
template <class T>
UNET_RT_HD void keep(T& value) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(T) == 8)
        asm volatile("" : "+l"(value));
    else
        asm volatile("" : "+r"(value));
#else
    static_cast<void>(value);
#endif
}

UNET_RT_HD void add_to(uint64_t* counter, uint64_t count) {
#if defined(__CUDA_ARCH__)
    atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(count));
#else
    *counter += count;
#endif
}

// ---------------------------------------------------------------------------------------------------------------- rows

// Rows of an output cut into vectors of `step` samples whose addresses are multiples of the vectors' size. Where rows
// do not begin on such an address, their first and last vector hold fewer samples.
struct Rows {
    Divider vectors;  // per row
    uint32_t items = 0;
    uint32_t step = 1;    // 1: samples are not adjacent
    bool peeled = false;  // rows may begin anywhere
    int64_t width = 0;

    // The samples [begin, end) of vector `item` of the row at `address`, which is row `y` of the plane.
    struct Span {
        int64_t x;  // of the vector; may lie before the row
        int64_t begin, end;
        bool whole;
    };

    UNET_RT_HD Span span(uint32_t item, uint32_t y, const void* row, uint32_t item_bytes, int64_t row_width) const {
        const uint32_t lead = peeled ? static_cast<uint32_t>(address_of(row)) / item_bytes & (step - 1) : 0;
        const int64_t x = static_cast<int64_t>(item - y * vectors.divisor) * step - lead;
        const int64_t end = x + step;
        return {x, x < 0 ? 0 : x, end < row_width ? end : row_width, step > 1 && x >= 0 && end <= row_width};
    }
};

// For rows of an array whose first sample is at `data`, that are `strides` apart (those of axes of one element 0).
// Vectors have `step` samples, or half of them, down to `least`, where all rows are made of whole vectors then.
template <class Strides>
Rows rows_of(int64_t height, int64_t width, const void* data, int64_t stride, const Strides& strides,
             int64_t item_bytes, int64_t step, int64_t least) {
    Rows rows;
    rows.width = width;
    uint64_t misaligned = address_of(data);
    for (const int64_t other : strides) misaligned |= static_cast<uint64_t>(other);
    if (stride == item_bytes && misaligned % static_cast<uint64_t>(item_bytes) == 0) {
        const uint64_t ragged = misaligned | static_cast<uint64_t>(width * item_bytes);
        if (ragged % static_cast<uint64_t>(least * item_bytes) == 0)
            while (ragged % static_cast<uint64_t>(step * item_bytes) != 0) step /= 2;
        rows.step = static_cast<uint32_t>(step);
        rows.peeled = misaligned % static_cast<uint64_t>(step * item_bytes) != 0;
    }
    const int64_t longest = rows.peeled ? width + rows.step - 1 : width;
    rows.vectors = Divider(std::max<int64_t>((longest + rows.step - 1) / rows.step, 1));
    const int64_t items = height * rows.vectors.divisor;
    if (items > INT32_MAX) throw std::length_error("a plane has more than 2^31 vectors of samples");
    rows.items = static_cast<uint32_t>(items);
    return rows;
}

inline int64_t blocks_for(uint32_t items) { return (static_cast<int64_t>(items) + kThreads - 1) / kThreads; }

// Strides of axes that have more than one element.
inline int64_t moving(const Array& array, int axis) { return array.shape[axis] > 1 ? array.stride[axis] : 0; }

}  // namespace unet_rt::cuda
