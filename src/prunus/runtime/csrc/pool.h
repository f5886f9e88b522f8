// Threads that wait between two matrices by spinning and between two tokens by sleeping.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace prunus {

class Pool {
  public:
    using Work = void (*)(void* argument, int thread);

    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int size() const { return threads_; }

    // Runs `work(argument, thread)` once on every thread and returns when all are done. One caller at a time.
    void run(Work work, void* argument);

    // Called by every thread inside `run`: none goes on before all have come.
    void barrier();

    // The next piece [first, last) of `size` units that wait between two barriers, for whoever asks; false if none is left.
    // A thread that other programs hold up takes fewer. Pieces shrink towards the end, so that all are done together.
    bool take(int64_t size, int64_t& first, int64_t& last);

  private:
    void serve(int thread);

    // Stops the workers and waits for them.
    void end();

    const int threads_;
    std::vector<std::thread> workers_;
    std::mutex callers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    Work work_ = nullptr;
    void* argument_ = nullptr;
    alignas(64) std::atomic<uint32_t> epoch_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<int64_t> taken_{0};  // units that are given away; every barrier sets it back
    std::atomic<int> asleep_{0};
    bool stop_ = false;  // written before the last epoch
};

}  // namespace prunus
