#include "windows.h"

#include <cstring>

namespace prunus {
namespace {

// A kept weight that found no slot costs about as much time as this many bytes read: measured on unstructured masks
// with 6 and with 8 slots.
constexpr double OVERFLOW_COST = 24;

struct Place {
    int64_t values;  // byte where the values of the quad or pair begin
    int64_t ids;
    int index;  // which of its slots, 0..63 or 0..31
    int half;   // slots in half of it: those in low nibbles
};

Place locate(const Matrix& matrix, int64_t row, int64_t window, int32_t slot) {
    const bool nibbles = matrix.layout == W16_I4;
    const int64_t size = quad_values(nibbles), inside = row % BLOCK;
    const int64_t base = row / BLOCK * windows_stride(matrix) + window * window_bytes(matrix.slots, nibbles);
    const int64_t at = base + slot / 4 * (size + 32);
    if (slot / 4 * 4 + 4 <= matrix.slots) return {at, at + size, int(inside * 4 + slot % 4), 32};
    return {at, at + size / 2, int(inside * 2 + slot % 4), 16};
}

void put_nibble(uint8_t* bytes, int index, int half, uint8_t value) {
    uint8_t& byte = bytes[index % half];
    byte = index < half ? uint8_t((byte & 0xf0) | value) : uint8_t((byte & 0x0f) | (value << 4));
}

uint8_t get_nibble(const uint8_t* bytes, int index, int half) {
    return index < half ? bytes[index % half] & 15 : bytes[index % half] >> 4;
}

}  // namespace

int32_t choose_slots(const uint64_t* bitmap, int64_t rows, int64_t chunks, bool nibbles, double& bytes) {
    int64_t windows[WINDOW + 1] = {};
    for (int64_t i = 0; i < rows * chunks; i++)
        for (int part = 0; part < 4; part++) windows[__builtin_popcountll(bitmap[i] >> (16 * part) & 0xffff)]++;
    int32_t best = WINDOW;
    double least = 0;
    for (int32_t slots = 2; slots <= WINDOW; slots += 2) {
        double cost = double(window_bytes(slots, nibbles)) / BLOCK * double(rows * chunks * 4);
        for (int count = slots + 1; count <= WINDOW; count++)
            cost += OVERFLOW_COST * double(count - slots) * double(windows[count]);
        if (slots == 2 || cost < least) {
            best = slots;
            least = cost;
        }
    }
    bytes = least / double(rows * chunks * CHUNK);
    return best;
}

// Free slots point to column 0 with the value 0. Values are zero already; with nibbles the whole buffer was filled.
void clear_ids(Matrix& matrix) {
    if (matrix.layout != W16_I4) return;
    uint8_t* bytes = matrix.values.as<uint8_t>();
    const int64_t windows = matrix.blocks() * (matrix.padded() / WINDOW), quads = matrix.slots / 4;
    for (int64_t window = 0; window < windows; window++, bytes += window_bytes(matrix.slots, true)) {
        for (int64_t quad = 0; quad < quads; quad++) std::memset(bytes + quad * 64 + 32, 0, 32);
        if (matrix.slots % 4) std::memset(bytes + quads * 64 + 16, 0, 16);
    }
}

void put_slot(Matrix& matrix, int64_t row, int64_t column, int32_t slot, int8_t code) {
    const Place place = locate(matrix, row, column / WINDOW, slot);
    uint8_t* bytes = matrix.values.as<uint8_t>();
    put_nibble(bytes + place.ids, place.index, place.half, uint8_t(column % WINDOW));
    if (matrix.layout == W16_I4)
        put_nibble(bytes + place.values, place.index, place.half, uint8_t(code + 8));
    else
        bytes[place.values + place.index] = uint8_t(code);
}

void get_slot(const Matrix& matrix, int64_t row, int64_t window, int32_t slot, int64_t& column, int32_t& code) {
    const Place place = locate(matrix, row, window, slot);
    const uint8_t* bytes = matrix.values.as<uint8_t>();
    column = window * WINDOW + get_nibble(bytes + place.ids, place.index, place.half);
    code = matrix.layout == W16_I4 ? get_nibble(bytes + place.values, place.index, place.half) - 8
                                   : int8_t(bytes[place.values + place.index]);
}

}  // namespace prunus
