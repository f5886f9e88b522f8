#include "buffer.h"

#include <cstdlib>
#include <cstring>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif

namespace prunus {
namespace {

constexpr int64_t LINE = 64, PAGE = int64_t(2) << 20, CHUNK_BYTES = 16 * PAGE;

std::shared_ptr<void> plain(int64_t bytes) {
    return std::shared_ptr<void>(std::aligned_alloc(LINE, size_t(bytes)), std::free);
}

// Whole huge pages. They are asked for, not owed: without them these are pages of the common size.
std::shared_ptr<void> pages(int64_t bytes) {
    const size_t whole = size_t(ceil_div(bytes, PAGE) * PAGE);
    std::shared_ptr<void> made(std::aligned_alloc(size_t(PAGE), whole), std::free);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (made) madvise(made.get(), whole, MADV_HUGEPAGE);
#endif
    return made;
}

// Matrices of small models are far smaller than a page, so they share chunks; a chunk goes with the last of its buffers.
class Chunks {
  public:
    std::shared_ptr<void> take(int64_t bytes) {
        if (bytes > CHUNK_BYTES / 4) return pages(bytes);
        std::lock_guard<std::mutex> lock(mutex_);
        std::shared_ptr<void> chunk = chunk_.lock();
        if (!chunk || used_ + bytes > CHUNK_BYTES) {
            chunk = pages(CHUNK_BYTES);
            chunk_ = chunk;
            used_ = 0;
        }
        if (!chunk) return nullptr;
        used_ += bytes;
        return std::shared_ptr<void>(chunk, static_cast<char*>(chunk.get()) + used_ - bytes);
    }

  private:
    std::mutex mutex_;
    std::weak_ptr<void> chunk_;
    int64_t used_ = 0;
};

std::shared_ptr<void> side_by_side(int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    return plain(bytes);  // between neighbours it would see nothing
#else
    static Chunks chunks;
    return chunks.take(bytes);
#endif
}

int64_t padded(int64_t bytes) { return ceil_div(bytes + PAD, LINE) * LINE; }

}  // namespace

bool Buffer::allocate(int64_t bytes) {
    data_ = side_by_side(padded(bytes));
    if (!data_) return false;
    std::memset(data_.get(), 0, size_t(padded(bytes)));
    size_ = bytes;
    return true;
}

bool Buffer::reserve(int64_t bytes) {
    data_ = plain(padded(bytes));
    if (!data_) return false;
    size_ = bytes;
    return true;
}

}  // namespace prunus
