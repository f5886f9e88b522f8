#include "activations.h"

#include <vector>

#include "pool.h"

namespace prunus {

bool Activations::allocate(int64_t widest) {
    const int64_t padded = ceil_div(widest, CHUNK) * CHUNK, chunks = padded / CHUNK;
    if (!floats_.allocate(padded * 4) || !rounded_.allocate(padded) || !scales_.allocate(chunks * 4)) return false;
    if (!minus128_.allocate(padded) || !minus8_.allocate(padded)) return false;
    input_ = {floats_.as<float>(), rounded_.as<int8_t>(), scales_.as<float>(), minus128_.as<int32_t>(),
              minus8_.as<int32_t>()};
    return true;
}

void Activations::set(const Kernels& kernels, const Matrix& matrix, const float* x) {
    const bool halves = matrix.layout == DENSE_BF16 || (matrix.layout == BMP_BF16 && kernels.halves);
    if (prepared_ && halves_ == halves && prepared_->quantised_input == matrix.quantised_input &&
        prepared_->order == matrix.order)
        return;
    prepared_ = &matrix;
    halves_ = halves;
    const int32_t* order = matrix.order.empty() ? nullptr : matrix.order.data();
    kernels.gather(x, order, matrix.columns, matrix.padded(), halves, floats_.as<float>());
    if (matrix.quantised_input)
        kernels.quantise(floats_.as<float>(), matrix.padded(), rounded_.as<int8_t>(), scales_.as<float>(),
                         minus128_.as<int32_t>(), minus8_.as<int32_t>());
}

namespace {

struct Product {
    const Kernels& kernels;
    const Matrix& matrix;
    const float* x;
    int64_t tokens;
    float* y;
    int threads;
    std::vector<Activations> scratch;
};

void product(void* argument, int thread) {
    auto& work = *static_cast<Product*>(argument);
    Activations& scratch = work.scratch[size_t(thread)];
    int64_t first, last;
    share(work.matrix.rows, thread, work.threads, first, last);
    for (int64_t token = 0; token < work.tokens && first < last; token++) {
        scratch.forget();
        scratch.set(work.kernels, work.matrix, work.x + token * work.matrix.columns);
        work.kernels.matvec(work.matrix, scratch.input(), work.y + token * work.matrix.rows, first, last);
    }
}

}  // namespace

Status multiply(const Kernels& kernels, Pool& pool, const Matrix& matrix, const float* x, int64_t tokens, float* y) {
    Product work{kernels, matrix, x, tokens, y, pool.size(), std::vector<Activations>(size_t(pool.size()))};
    for (Activations& scratch : work.scratch)
        if (!scratch.allocate(matrix.columns)) return NO_MEMORY;
    pool.run(product, &work);
    return OK;
}

}  // namespace prunus
