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

constexpr int64_t TILE = 64;     // tokens that go through the layers together
constexpr int64_t LIST = GROUP;  // room for a list; a vector store of the second chunk ends there too

// Kept weights of 16 rows, as (column within a group of 128, value) for each row and group.
struct Lists {
    uint8_t* id;     // [16, groups, LIST]
    float* value;    // [16, groups, LIST]; also the 16 rows as dense floats
    int32_t* count;  // [16, groups]
};

struct TileAttention {
    const float* query;  // [head_dim][64], rotated
    const float* keys;   // [context, head_dim]
    const float* values;
    int64_t head_dim, position, count, window;  // position of the first token; tokens in the tile
    float scale, softcap;
    float* out;  // [head_dim][64]
};

// What works on tiles: matrices of [rows][64 tokens].
struct TileKernels {
    // y [tiles, rows, 64] for rows [first, last) from x [tiles, padded, 64]; `dense`: by way of dense rows.
    void (*multiply)(const Matrix& matrix, bool dense, const float* x, int64_t tiles, float* y, int64_t first,
                     int64_t last, const Lists& lists);
    // Chunks [first, last) of x [columns][64] in stored order, padded, rounded if the matrix wants it.
    void (*gather)(const Matrix& matrix, const float* x, int64_t first, int64_t last, float* out);
    void (*inverse_norms)(const float* x, int64_t rows, float eps, float* out);
    void (*scale_rows)(const float* x, const float* inverse, const float* weight, int64_t rows, float* out);
    void (*transpose)(const float* x, int64_t stride, int64_t rows, int64_t columns, float* out, int64_t out_stride);
    void (*turn)(float* x, const float* norm, float eps, int64_t dim, const float* cos, const float* sin,
                 int64_t rotary);
    void (*attend)(const TileAttention& attention);
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
    TileKernels tile;
};

// nullptr if this processor cannot run them. `name`: "", "portable", "avx2", "avx512" or "neon"; "" = the fastest.
const Kernels* choose(const char* name);

}  // namespace prunus
