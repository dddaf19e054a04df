// CPU kernel: every thread counts into tables of its own, which are added up at the end.
#include "histogram.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace unet_rt {
namespace {

constexpr int64_t kBlock = int64_t{1} << 16;    // values counted at a time
constexpr int64_t kLongest = int64_t{1} << 30;  // values after which 32-bit counts are handed over

// Equal neighbours, the rule in images, would wait for each other's count in one table.
// Values may lie at any address: those of a mapped file do.
template <class Value, int kTables>
void count(const char* values, int64_t size, uint32_t* tables) {
    constexpr int64_t kValues = int64_t{1} << (8 * sizeof(Value));
    const auto at = [values](int64_t i) {
        Value value;
        std::memcpy(&value, values + i * static_cast<int64_t>(sizeof(Value)), sizeof(Value));
        return value;
    };
    int64_t i = 0;
    for (; i + kTables <= size; i += kTables)
        for (int k = 0; k < kTables; ++k) ++tables[k * kValues + at(i + k)];
    for (; i < size; ++i) ++tables[at(i)];
}

template <class Value, int kTables>
void run(const Histogram& call, int threads) {
    constexpr int64_t kValues = int64_t{1} << (8 * sizeof(Value));
    const auto* const values = static_cast<const char*>(call.values);
    const int workers = worker_count(call.size / 2, threads);
    std::vector<uint32_t> tables(static_cast<size_t>(workers * kTables * kValues));
    std::vector<int64_t> seen(static_cast<size_t>(workers));
    std::vector<int64_t> sums(static_cast<size_t>(workers * kValues));
    const auto hand_over = [&](int worker) {
        uint32_t* const own = tables.data() + worker * kTables * kValues;
        int64_t* const sum = sums.data() + worker * kValues;
        for (int k = 0; k < kTables; ++k)
            for (int64_t v = 0; v < kValues; ++v) sum[v] += own[k * kValues + v];
        std::fill(own, own + kTables * kValues, 0u);
        seen[static_cast<size_t>(worker)] = 0;
    };
    const int64_t blocks = (call.size + kBlock - 1) / kBlock;
    parallel_for(blocks, workers, [&](int worker, int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = block * kBlock;
            const int64_t size = std::min(kBlock, call.size - first);
            const char* const block_values = values + first * static_cast<int64_t>(sizeof(Value));
            count<Value, kTables>(block_values, size, tables.data() + worker * kTables * kValues);
            seen[static_cast<size_t>(worker)] += size;
            if (seen[static_cast<size_t>(worker)] >= kLongest) hand_over(worker);
        }
    });
    for (int worker = 0; worker < workers; ++worker) {
        hand_over(worker);
        for (int64_t v = 0; v < kValues; ++v) call.counts[v] += sums[static_cast<size_t>(worker * kValues + v)];
    }
}

}  // namespace

void histogram(const Histogram& call, int threads) {
    if (call.bytes == 1)
        run<uint8_t, 8>(call, threads);
    else
        run<uint16_t, 2>(call, threads);
}

}  // namespace unet_rt
