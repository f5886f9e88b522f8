// Products with tiles of 64 tokens, for prefill and for `Linear` with many tokens.
#pragma once
#include "kernels.h"
#include "pool.h"

namespace prunus {

// From this many tokens on a tile is faster than one token after another.
constexpr int64_t FEW = 12;

// Density above which a matrix is met as dense rows: measured once per process and instruction set.
double crossover(const Kernels& kernels);

inline double density(const Matrix& matrix) { return double(matrix.kept) / double(matrix.rows) / double(matrix.columns); }

inline bool as_dense(const Kernels& kernels, const Matrix& matrix) {
    return matrix.layout <= DENSE_I8 || density(matrix) > crossover(kernels);
}

// One thread's lists of kept weights.
class ListSpace {
  public:
    bool allocate(int64_t widest);
    Lists lists() { return {ids_.as<uint8_t>(), values_.as<float>(), counts_.as<int32_t>()}; }

  private:
    Buffer ids_, values_, counts_;
};

// y [tokens, rows] = x [tokens, columns] times the transposed matrix, in tiles, on all threads.
Status multiply_tiles(const Kernels& kernels, Pool& pool, const Matrix& matrix, const float* x, int64_t tokens, float* y);

}  // namespace prunus
