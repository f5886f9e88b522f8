// The functions that exist once per instruction set.
#pragma once
#include "matrix.h"

namespace prunus {

enum Activation : int32_t { SILU, GELU_TANH, GELU, RELU, RELU_SQUARED };

struct Attention {
    const float* query;  // [head_dim], rotated
    const float* keys;   // [context, head_dim]
    const float* values;
    int64_t head_dim;
    int64_t from, to;  // positions that are seen: [from, to)
    float scale;
    float softcap;  // 0 = none
    float* scores;  // scratch [to - from]
    float* out;     // [head_dim]
};

struct Kernels {
    const char* name;
    bool expand;  // int8 activations are multiplied straight from bitmaps
    bool halves;  // 16-bit values are expanded from bitmaps in pairs, so their activations lie even columns first

    // Columns in stored order, zeros behind them; `halves`: even columns before odd ones, as 16-bit values want it.
    void (*gather)(const float* x, const int32_t* order, int64_t columns, int64_t padded, bool halves, float* out);
    // int8 by the largest of each chunk; `minus128` and `minus8`: see Input; only for `expand`.
    void (*quantise)(const float* x, int64_t padded, int8_t* q, float* scale, int32_t* minus128, int32_t* minus8);
    // y[row] for rows [first, last); `first` is a multiple of 16.
    void (*matvec)(const Matrix& matrix, const Input& input, float* y, int64_t first, int64_t last);

    void (*rms_norm)(const float* x, const float* weight, float eps, int64_t size, float* out);
    void (*add)(const float* x, int64_t size, float* out);
    void (*gate)(Activation kind, const float* gate, int64_t size, float* up);  // up *= activation(gate)
    void (*attend)(const Attention& attention);
    int64_t (*largest)(const float* x, int64_t size);  // index, the first of equals
};

// nullptr if this processor cannot run them. `name`: "", "portable", "avx2", "avx512" or "neon"; "" = the fastest.
const Kernels* choose(const char* name);

}  // namespace prunus
