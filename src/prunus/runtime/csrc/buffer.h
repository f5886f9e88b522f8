// Memory of weights, keys and values, and scratch.
#pragma once
#include <cstdint>
#include <memory>

namespace prunus {

constexpr int64_t PAD = 128;  // readable bytes behind every buffer, for vector loads that run over its end

inline int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Bytes aligned to a cache line, with PAD readable bytes behind them.
class Buffer {
  public:
    Buffer() = default;
    Buffer(Buffer&&) = default;
    Buffer& operator=(Buffer&&) = default;

    // Zeroed, beside other buffers in huge pages where the system has them: of pages of 4 kB a processor has to look up
    // thousands for every token. Decoding was measured to take 4 to 6 % less time.
    bool allocate(int64_t bytes);
    // Not zeroed and in pages of their own: memory that is not touched is not used.
    bool reserve(int64_t bytes);
    template <typename T> T* as() { return static_cast<T*>(data_.get()); }
    template <typename T> const T* as() const { return static_cast<const T*>(data_.get()); }
    int64_t size() const { return size_; }

  private:
    std::shared_ptr<void> data_;
    int64_t size_ = 0;
};

}  // namespace prunus
