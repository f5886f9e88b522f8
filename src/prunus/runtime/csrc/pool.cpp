#include "pool.h"

#include <algorithm>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace prunus {
namespace {

// A barrier comes within microseconds; the next token within tens of them. On a machine that others use, who waits
// longer gives the processor away.
constexpr int SPINS = 2000;
constexpr int YIELDS = 200;

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// True once `value` is no longer `seen`; false if it still is after spinning.
bool changed(const std::atomic<uint32_t>& value, uint32_t seen, int yields) {
    for (int spin = 0; spin < SPINS; spin++) {
        if (value.load(std::memory_order_acquire) != seen) return true;
        pause();
    }
    for (int turn = 0; turn < yields; turn++) {
        if (value.load(std::memory_order_acquire) != seen) return true;
        std::this_thread::yield();
    }
    return false;
}

}  // namespace

Pool::Pool(int threads) : threads_(threads < 1 ? 1 : threads) {
    try {
        for (int thread = 1; thread < threads_; thread++) workers_.emplace_back([this, thread] { serve(thread); });
    } catch (...) {  // the machine gives no more threads: those that run must end before the vector does
        end();
        throw;
    }
}

Pool::~Pool() { end(); }

void Pool::end() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
        epoch_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void Pool::run(Work work, void* argument) {
    std::lock_guard<std::mutex> one(callers_);
    work_ = work;
    argument_ = argument;
    if (threads_ > 1) {
        // seq_cst on both: a worker either sees the new epoch before it sleeps, or is seen asleep here.
        epoch_.fetch_add(1);
        if (asleep_.load() > 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
    }
    work(argument, 0);
    barrier();
}

void Pool::barrier() {
    if (threads_ == 1) {
        taken_.store(0, std::memory_order_relaxed);
        return;
    }
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        taken_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        return;
    }
    while (!changed(phase_, phase, YIELDS)) {
    }
}

bool Pool::take(int64_t size, int64_t& first, int64_t& last) {
    first = taken_.load(std::memory_order_relaxed);
    do {
        if (first >= size) return false;
        last = first + std::max<int64_t>(1, (size - first) / (2 * threads_));
    } while (!taken_.compare_exchange_weak(first, last, std::memory_order_relaxed));
    return true;
}

void Pool::serve(int thread) {
    for (uint32_t seen = 0;;) {
        if (!changed(epoch_, seen, YIELDS)) {
            std::unique_lock<std::mutex> lock(mutex_);
            asleep_.fetch_add(1);
            wake_.wait(lock, [&] { return epoch_.load() != seen; });
            asleep_.fetch_sub(1);
        }
        seen++;
        if (stop_) return;
        work_(argument_, thread);
        barrier();
    }
}

}  // namespace prunus
