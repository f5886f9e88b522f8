// Where the slots of the w16 layout lie.
//
// A block of 16 rows holds, window after window of 16 columns, the slots of all its rows. Four slots of a row make a
// quad: 64 bytes (rows 0-7, then rows 8-15; a row's four slots are neighbours) and 32 bytes of ids, low nibble for the
// first 32 slots, high nibble for the other 32. If the number of slots is no multiple of 4, a pair follows: 32 bytes
// (16 rows, two slots each) and 16 bytes of ids. int4 stores the values as it stores the ids.
#pragma once
#include "matrix.h"

namespace prunus {

// Bytes of values in a quad; a pair has half of it.
inline int64_t quad_values(bool nibbles) { return nibbles ? 32 : 64; }

inline int64_t window_bytes(int32_t slots, bool nibbles) {
    const int64_t quad = quad_values(nibbles) + 32;
    return slots / 4 * quad + (slots % 4 ? quad / 2 : 0);
}

inline int64_t windows_stride(const Matrix& matrix) {
    return matrix.padded() / WINDOW * window_bytes(matrix.slots, matrix.layout == W16_I4);
}

// The number of slots whose bytes and overflow cost least, and what they cost in bytes per weight.
int32_t choose_slots(const uint64_t* bitmap, int64_t rows, int64_t chunks, bool nibbles, double& bytes);

void clear_ids(Matrix& matrix);
void put_slot(Matrix& matrix, int64_t row, int64_t column, int32_t slot, int8_t code);
void get_slot(const Matrix& matrix, int64_t row, int64_t window, int32_t slot, int64_t& column, int32_t& code);

}  // namespace prunus
