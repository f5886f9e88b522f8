// One thread's activation vector in the form that a matrix reads.
#pragma once
#include "kernels.h"

namespace prunus {

class Activations {
  public:
    bool allocate(int64_t widest);
    void forget() { prepared_ = nullptr; }
    // Gathers and rounds `x` [matrix.columns] as `matrix` wants it, unless that was just done for another matrix.
    void set(const Kernels& kernels, const Matrix& matrix, const float* x);
    const Input& input() const { return input_; }

  private:
    Buffer floats_, rounded_, scales_, minus128_, minus8_;
    Input input_{};
    const Matrix* prepared_ = nullptr;
    bool halves_ = false;
};

// y [tokens, rows] = x [tokens, columns] times the transposed matrix, on all threads.
Status multiply(const Kernels& kernels, class Pool& pool, const Matrix& matrix, const float* x, int64_t tokens, float* y);

// Whole blocks of 16 rows, so that no two threads write one cache line.
inline void share(int64_t rows, int thread, int threads, int64_t& first, int64_t& last) {
    const int64_t blocks = ceil_div(rows, BLOCK);
    first = blocks * thread / threads * BLOCK;
    last = blocks * (thread + 1) / threads * BLOCK;
    if (last > rows) last = rows;
}

}  // namespace prunus
