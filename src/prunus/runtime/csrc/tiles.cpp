#include "tiles.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "activations.h"

namespace prunus {
namespace {

struct Product {
    const Kernels& kernels;
    const Matrix& matrix;
    const float* x;
    int64_t tokens;
    float* y;
    Pool& pool;
    bool dense;
    std::vector<ListSpace> lists;
    Buffer given, gathered, out;  // [columns][64], [padded][64], [rows][64]
};

void product(void* argument, int thread) {
    auto& work = *static_cast<Product*>(argument);
    const TileKernels& tile = work.kernels.tile;
    const Matrix& matrix = work.matrix;
    const int threads = work.pool.size();
    int64_t first, last;
    share(matrix.rows, thread, threads, first, last);
    const int64_t chunk = matrix.chunks * thread / threads, end = matrix.chunks * (thread + 1) / threads;
    for (int64_t token = 0; token < work.tokens; token += TILE) {
        const int64_t count = std::min(TILE, work.tokens - token);
        if (thread == 0) {
            if (count < TILE) std::memset(work.given.as<float>(), 0, size_t(matrix.columns * TILE * 4));
            tile.transpose(work.x + token * matrix.columns, matrix.columns, count, matrix.columns,
                           work.given.as<float>(), TILE);
        }
        work.pool.barrier();
        tile.gather(matrix, work.given.as<float>(), chunk, end, work.gathered.as<float>());
        work.pool.barrier();
        if (first >= last) continue;
        tile.multiply(matrix, work.dense, work.gathered.as<float>(), 1, work.out.as<float>(), first, last,
                      work.lists[size_t(thread)].lists());
        tile.transpose(work.out.as<float>() + first * TILE, TILE, last - first, count,
                       work.y + token * matrix.rows + first, matrix.rows);
    }
}

// A matrix of random weights of which a share is kept.
Status sample(double share, std::unique_ptr<Matrix>& out) {
    constexpr int64_t SIZE = 512;
    std::vector<uint8_t> bitmap(SIZE * SIZE / 8, 0);
    std::vector<float> values;
    uint32_t state = 1;
    for (int64_t i = 0; i < SIZE * SIZE; i++) {
        state = state * 1664525u + 1013904223u;
        if ((state >> 8) / double(1 << 24) >= share) continue;
        bitmap[size_t(i / 8)] |= uint8_t(1 << (i % 8));
        values.push_back(1.0f);
    }
    const Packed packed{SIZE, SIZE, 0, bitmap.data(), int64_t(bitmap.size()), values.data(),
                        int64_t(values.size() * 4), nullptr, 0, nullptr, 0};
    return build(packed, 0, out);
}

// Seconds of one product with two tiles, the least of a few.
double seconds(const Kernels& kernels, const Matrix& matrix, bool dense, Lists lists, const Buffer& x, Buffer& y) {
    double least = 1e9;
    for (int turn = 0; turn < 4; turn++) {
        const auto start = std::chrono::steady_clock::now();
        kernels.tile.multiply(matrix, dense, x.as<float>(), 2, y.as<float>(), 0, matrix.rows, lists);
        least = std::min(least, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return least;
}

double measure(const Kernels& kernels) {
    std::unique_ptr<Matrix> sparse, full;
    ListSpace space;
    Buffer x, y;
    if (sample(0.2, sparse) != OK || sample(0.6, full) != OK || !space.allocate(512)) return 0.5;
    if (!x.allocate(2 * 512 * TILE * 4) || !y.allocate(2 * 512 * TILE * 4)) return 0.5;
    const double low = seconds(kernels, *sparse, false, space.lists(), x, y);
    const double high = seconds(kernels, *full, false, space.lists(), x, y);
    const double dense = seconds(kernels, *full, true, space.lists(), x, y);
    // Time grows with density on a line; where it meets that of dense rows is the crossover.
    return high > low ? std::max(0.05, std::min(0.95, 0.2 + 0.4 * (dense - low) / (high - low))) : 0.5;
}

}  // namespace

double crossover(const Kernels& kernels) {
    static std::mutex mutex;
    static std::map<const Kernels*, double> measured;
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = measured.find(&kernels);
    return found != measured.end() ? found->second : measured[&kernels] = measure(kernels);
}

bool ListSpace::allocate(int64_t widest) {
    const int64_t size = BLOCK * ceil_div(widest, GROUP) * LIST;
    return ids_.allocate(size) && values_.allocate(size * 4) && counts_.allocate(size / LIST * 4);
}

Status multiply_tiles(const Kernels& kernels, Pool& pool, const Matrix& matrix, const float* x, int64_t tokens,
                      float* y) {
    Product work{kernels, matrix, x, tokens, y, pool, as_dense(kernels, matrix), {}, {}, {}, {}};
    work.lists = std::vector<ListSpace>(size_t(pool.size()));
    for (ListSpace& space : work.lists)
        if (!space.allocate(matrix.columns)) return NO_MEMORY;
    if (!work.given.allocate(matrix.columns * TILE * 4) || !work.gathered.allocate(matrix.padded() * TILE * 4) ||
        !work.out.allocate(matrix.rows * TILE * 4))
        return NO_MEMORY;
    pool.run(product, &work);
    return OK;
}

}  // namespace prunus
