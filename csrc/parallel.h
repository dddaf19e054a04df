// Threads for one call: they are started and joined here, and nothing stays behind.
//
// A persistent pool would not survive fork() (data loaders fork), and would compete with the pools of the inference
// libraries. Starting and joining a thread was measured at 15 to 20 us, the time of copying some 100 kB, so a call gets
// a second thread only when each has several times that to do.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>

namespace unet_rt {

constexpr int kMaxThreads = 64;  // memory bandwidth is exhausted long before
constexpr int64_t kSamplesPerThread = int64_t{1} << 17;
constexpr int64_t kChunksPerThread = 8;  // on shared machines threads do not advance equally

inline int worker_count(int64_t samples, int threads) {
    const int64_t useful = samples / kSamplesPerThread;
    return static_cast<int>(std::clamp<int64_t>(useful, 1, std::min(threads, kMaxThreads)));
}

// Calls body(worker, begin, end) until [0, items) is done; worker < workers tells scratch memory apart.
template <class Body>
void parallel_for(int64_t items, int workers, const Body& body) {
    if (workers <= 1 || items <= 1) {
        if (items > 0) body(0, int64_t{0}, items);
        return;
    }
    const int64_t chunk = std::max<int64_t>(1, items / (workers * kChunksPerThread));
    std::atomic<int64_t> next{0};
    const auto work = [&](int worker) {
        for (;;) {
            const int64_t begin = next.fetch_add(chunk);
            if (begin >= items) return;
            body(worker, begin, std::min(items, begin + chunk));
        }
    };
    std::thread started[kMaxThreads];
    int count = 0;
    for (int worker = 1; worker < workers; ++worker) {
        try {
            started[count] = std::thread(work, worker);
            ++count;
        } catch (const std::system_error&) {
            break;  // the system gives no more threads: those at hand do all the work, with the same result
        }
    }
    work(0);
    for (int i = 0; i < count; ++i) started[i].join();
}

}  // namespace unet_rt
