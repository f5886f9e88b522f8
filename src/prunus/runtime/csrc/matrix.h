// A weight matrix in the form in which kernels read it, and the activation vector that it is multiplied with.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "buffer.h"

namespace prunus {

constexpr int64_t CHUNK = 64;   // columns per bitmap word and per scale of a quantised activation
constexpr int64_t GROUP = 128;  // columns per scale of quantised weights
constexpr int64_t BLOCK = 16;   // rows that are handed to a thread together
constexpr int64_t WINDOW = 16;  // columns whose activations fit one byte shuffle

enum Layout : int32_t {
    DENSE_F32,
    DENSE_BF16,
    DENSE_I8,  // bytes w + 128
    BMP_F32,   // a bit per weight, and the kept values
    BMP_BF16,
    BMP_I8,  // bytes w + 128
    BMP_I4,  // codes 0..15 for -8..7, two in a byte; every chunk of a row begins with a whole byte
    W16_I8,  // windows of 16 columns with a fixed number of slots for 16 rows, the rest in a list
    W16_I4,
};

enum Status : int32_t {
    OK = 0,
    BAD_ARGUMENT = -1,
    BAD_LENGTH = -2,   // the values are not as many as the bitmap has bits
    BAD_PADDING = -3,  // bits are set behind the last column
    BAD_SCALE = -4,    // not finite
    BAD_ORDER = -5,    // not a permutation
    NO_MEMORY = -6,
    NOT_BUILT = -7,  // the layout needs instructions that this processor lacks
    TOO_LONG = -8,   // behind the end of the context
    BAD_TOKEN = -9,
    BAD_SHAPE = -10,  // matrices of the model do not fit together
};

// One kept weight that found no slot in its window.
struct Overflow {
    uint32_t column;
    float value;
};

struct Matrix {
    Layout layout;
    int64_t rows, columns;
    int64_t chunks;             // per row
    int64_t groups;             // per row
    int64_t kept;               // weights that are stored
    bool quantised_input;       // activations are rounded to int8, one scale per chunk
    int32_t slots = 0;          // W16: per row and window, even
    Buffer values;              // BMP: row after row; DENSE: rows x chunks * 64; W16: see w16.inl
    Buffer bitmap;              // uint64 [rows, chunks]
    Buffer scales;              // fp16 [blocks, groups, 16]: the scales of one group of 16 rows lie together
    std::vector<int64_t> start;     // byte of `values` where each block of 16 rows begins, and the end
    std::vector<uint32_t> row_start;  // BMP with rounded input: byte behind `start` of its block where each row begins
    std::vector<Overflow> overflow;  // row after row
    std::vector<int64_t> overflow_start;  // [rows + 1], empty without overflow
    std::vector<int32_t> order;      // stored column -> column of the activation; empty = identity

    int64_t blocks() const { return ceil_div(rows, BLOCK); }
    int64_t padded() const { return chunks * CHUNK; }
    // What one product with a vector reads.
    int64_t bytes() const;
};

// The activation, as a layout wants it: gathered, padded with zeros, as floats or as int8 with scales.
struct Input {
    const float* x;        // [padded]; for 16-bit values even columns before odd ones in each vector
    const int8_t* q;       // [padded]
    const float* scale;    // [chunks]
    const int32_t* minus128;  // [padded / 4]: -128 times the sum of four q, as bytes w + 128 need it
    const int32_t* minus8;    // [padded / 4]: -8 times it
};

float half_to_float(uint16_t half);
float bf16_to_float(uint16_t value);

// All weights of rows [first, first + count) as floats in stored column order, `out` is [count, padded()].
void decode_rows(const Matrix& matrix, int64_t first, int64_t count, float* out);

struct Packed {
    int64_t rows, columns;
    int32_t kind;  // 0 fp32, 1 bf16, 2 int8, 3 int4
    const uint8_t* bitmap;
    int64_t bitmap_bytes;
    const void* values;
    int64_t values_bytes;
    const uint16_t* scales;
    int64_t scales_count;
    const int32_t* order;
    int64_t order_count;
};

// `layout`: 0 = float activations from bitmaps, 1 = int8 activations from bitmaps, 2 = int8 activations from windows, 3 =
// that of 1 and 2 which is faster where bytes are expanded by one instruction.
Status build(const Packed& packed, int32_t layout, std::unique_ptr<Matrix>& out);

// `kind`: 0 fp32, 1 bf16, 2 int8 with one scale per 128 columns; bitmap and order are not used.
Status build_dense(const Packed& packed, std::unique_ptr<Matrix>& out);

}  // namespace prunus
