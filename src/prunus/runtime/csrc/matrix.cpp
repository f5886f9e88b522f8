// Packed matrices are checked here, once, and turned into the form that kernels read. Kernels check nothing.
#include "matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "windows.h"

namespace prunus {
namespace {

// Products of sizes stay far below 2^63, and bytes of 16 rows below 2^32.
constexpr int64_t MOST_ROWS = int64_t(1) << 28, MOST_COLUMNS = int64_t(1) << 26;

bool finite_half(uint16_t half) { return (half & 0x7c00) != 0x7c00; }

void set_scale(Matrix& matrix, int64_t row, int64_t group, uint16_t scale) {
    matrix.scales.as<uint16_t>()[(row / BLOCK * matrix.groups + group) * BLOCK + row % BLOCK] = scale;
}

float scale_of(const Matrix& matrix, int64_t row, int64_t group) {
    return half_to_float(matrix.scales.as<uint16_t>()[(row / BLOCK * matrix.groups + group) * BLOCK + row % BLOCK]);
}

bool allocate_scales(Matrix& matrix) { return matrix.scales.allocate(matrix.blocks() * matrix.groups * BLOCK * 2); }

Status set_shape(Matrix& matrix, int64_t rows, int64_t columns) {
    if (rows < 1 || columns < 1 || rows > MOST_ROWS || columns > MOST_COLUMNS) return BAD_ARGUMENT;
    matrix.rows = rows;
    matrix.columns = columns;
    matrix.chunks = ceil_div(columns, CHUNK);
    matrix.groups = ceil_div(columns, GROUP);
    return OK;
}

// Copies the bitmap into whole words and counts the kept weights of every row.
Status read_bitmap(const Packed& packed, Matrix& matrix, std::vector<int64_t>& kept) {
    const int64_t stride = ceil_div(packed.columns, 8);
    if (packed.bitmap_bytes != packed.rows * stride) return BAD_LENGTH;
    if (!matrix.bitmap.allocate(matrix.rows * matrix.chunks * 8)) return NO_MEMORY;
    const int used = int(packed.columns % 8);
    auto* words = matrix.bitmap.as<uint64_t>();
    for (int64_t row = 0; row < packed.rows; row++) {
        const uint8_t* bytes = packed.bitmap + row * stride;
        if (used && (bytes[stride - 1] >> used)) return BAD_PADDING;
        uint64_t* out = words + row * matrix.chunks;
        for (int64_t i = 0; i < stride; i++) out[i / 8] |= uint64_t(bytes[i]) << (8 * (i % 8));
        for (int64_t i = 0; i < matrix.chunks; i++) kept[row] += __builtin_popcountll(out[i]);
        matrix.kept += kept[row];
    }
    return OK;
}

Status read_scales(const Packed& packed, Matrix& matrix) {
    if (packed.scales_count != packed.rows * matrix.groups || !packed.scales) return BAD_LENGTH;
    if (!allocate_scales(matrix)) return NO_MEMORY;
    for (int64_t row = 0; row < packed.rows; row++)
        for (int64_t group = 0; group < matrix.groups; group++) {
            const uint16_t scale = packed.scales[row * matrix.groups + group];
            if (!finite_half(scale)) return BAD_SCALE;
            set_scale(matrix, row, group, scale);
        }
    return OK;
}

Status read_order(const Packed& packed, Matrix& matrix) {
    if (!packed.order) return OK;
    if (packed.order_count != packed.columns) return BAD_ORDER;
    std::vector<bool> seen(size_t(packed.columns), false);
    bool identity = true;
    for (int64_t i = 0; i < packed.columns; i++) {
        const int64_t column = packed.order[i];
        if (column < 0 || column >= packed.columns || seen[size_t(column)]) return BAD_ORDER;
        seen[size_t(column)] = true;
        identity = identity && column == i;
    }
    if (!identity) matrix.order.assign(packed.order, packed.order + packed.columns);
    return OK;
}

int64_t expected_bytes(const Packed& packed, const std::vector<int64_t>& kept) {
    static const int64_t WIDTH[] = {4, 2, 1};
    int64_t bytes = 0;
    for (const int64_t count : kept) bytes += packed.kind == 3 ? (count + 1) / 2 : count * WIDTH[packed.kind];
    return bytes;
}

void mark_rows(Matrix& matrix, const std::vector<int64_t>& bytes_per_row) {
    int64_t at = 0;
    for (int64_t row = 0; row < matrix.rows; row++) {
        if (row % BLOCK == 0) matrix.start.push_back(at);
        if (matrix.quantised_input) matrix.row_start.push_back(uint32_t(at - matrix.start.back()));
        at += bytes_per_row[size_t(row)];
    }
    matrix.start.push_back(at);
}

Status fill_plain(const Packed& packed, Matrix& matrix, const std::vector<int64_t>& kept) {
    const int64_t width = packed.kind == 0 ? 4 : packed.kind == 1 ? 2 : 1;
    if (!matrix.values.allocate(packed.values_bytes)) return NO_MEMORY;
    if (packed.values_bytes) std::memcpy(matrix.values.as<uint8_t>(), packed.values, size_t(packed.values_bytes));
    if (packed.kind == 2)
        for (int64_t i = 0; i < packed.values_bytes; i++) matrix.values.as<uint8_t>()[i] ^= 0x80;
    std::vector<int64_t> bytes(kept);
    for (auto& count : bytes) count *= width;
    mark_rows(matrix, bytes);
    return OK;
}

uint8_t nibble(const uint8_t* codes, int64_t index) { return (codes[index / 2] >> (4 * (index % 2))) & 15; }

// Codes again two in a byte, but every chunk of a row begins with a whole byte.
Status fill_nibbles(const Packed& packed, Matrix& matrix, const std::vector<int64_t>& kept) {
    const auto* words = matrix.bitmap.as<uint64_t>();
    std::vector<int64_t> bytes(kept.size(), 0);
    for (int64_t row = 0; row < matrix.rows; row++)
        for (int64_t chunk = 0; chunk < matrix.chunks; chunk++)
            bytes[size_t(row)] += (__builtin_popcountll(words[row * matrix.chunks + chunk]) + 1) / 2;
    mark_rows(matrix, bytes);
    if (!matrix.values.allocate(matrix.start.back())) return NO_MEMORY;
    uint8_t* out = matrix.values.as<uint8_t>();
    const auto* codes = static_cast<const uint8_t*>(packed.values);
    for (int64_t row = 0; row < matrix.rows; row++) {
        int64_t index = 0;
        for (int64_t chunk = 0; chunk < matrix.chunks; chunk++) {
            const int count = __builtin_popcountll(words[row * matrix.chunks + chunk]);
            for (int i = 0; i < count; i++, index++) out[i / 2] |= uint8_t(nibble(codes, index) << (4 * (i % 2)));
            out += (count + 1) / 2;
        }
        codes += (index + 1) / 2;
    }
    return OK;
}

// Codes of one row at their columns; what is not kept is 0.
void expand_codes(const Packed& packed, const Matrix& matrix, int64_t row, const uint8_t* codes, int8_t* out) {
    const uint64_t* words = matrix.bitmap.as<uint64_t>() + row * matrix.chunks;
    int64_t index = 0;
    for (int64_t chunk = 0; chunk < matrix.chunks; chunk++)
        for (uint64_t word = words[chunk]; word; word &= word - 1, index++)
            out[chunk * CHUNK + __builtin_ctzll(word)] =
                packed.kind == 2 ? int8_t(codes[index]) : int8_t(nibble(codes, index) - 8);
}

Status fill_windows(const Packed& packed, Matrix& matrix, const std::vector<int64_t>& kept) {
    double cost;
    const int32_t slots = choose_slots(matrix.bitmap.as<uint64_t>(), matrix.rows, matrix.chunks, packed.kind == 3, cost);
    matrix.slots = slots;
    const int64_t stride = windows_stride(matrix);
    if (!matrix.values.allocate(matrix.blocks() * stride)) return NO_MEMORY;
    for (int64_t block = 0; block <= matrix.blocks(); block++) matrix.start.push_back(block * stride);
    std::vector<int8_t> row_codes(size_t(matrix.padded()));
    matrix.overflow_start.push_back(0);
    const auto* codes = static_cast<const uint8_t*>(packed.values);
    if (packed.kind == 3) std::memset(matrix.values.as<uint8_t>(), 0x88, size_t(matrix.values.size()));  // code 8 is 0
    clear_ids(matrix);
    for (int64_t row = 0; row < matrix.rows; row++) {
        std::fill(row_codes.begin(), row_codes.end(), int8_t(0));
        expand_codes(packed, matrix, row, codes, row_codes.data());
        codes += packed.kind == 2 ? kept[size_t(row)] : (kept[size_t(row)] + 1) / 2;
        const uint64_t* words = matrix.bitmap.as<uint64_t>() + row * matrix.chunks;
        for (int64_t column = 0, used = 0; column < matrix.padded(); column++) {
            if (column % WINDOW == 0) used = 0;
            if (!(words[column / CHUNK] >> (column % CHUNK) & 1)) continue;
            const int8_t code = row_codes[size_t(column)];
            if (used < slots)
                put_slot(matrix, row, column, int32_t(used++), code);
            else
                matrix.overflow.push_back({uint32_t(column), float(code) * scale_of(matrix, row, column / GROUP)});
        }
        matrix.overflow_start.push_back(int64_t(matrix.overflow.size()));
    }
    if (matrix.overflow.empty()) matrix.overflow_start.clear();
    matrix.bitmap = Buffer();
    return OK;
}

// Expanding bitmaps takes as long as reading this many bytes per weight in windows, however few they hold (measured with
// AVX-512; two codes in a byte have to be parted first).
constexpr double EXPAND_COST = 0.38, EXPAND_COST_NIBBLES = 0.47;

bool windows_are_faster(const Matrix& matrix, bool nibbles) {
    double windows;
    choose_slots(matrix.bitmap.as<uint64_t>(), matrix.rows, matrix.chunks, nibbles, windows);
    const double density = double(matrix.kept) / double(matrix.rows * matrix.columns);
    return windows < std::max(nibbles ? EXPAND_COST_NIBBLES : EXPAND_COST, 0.125 + density * (nibbles ? 0.5 : 1.0));
}

Status fill(const Packed& packed, Matrix& matrix, bool choose) {
    std::vector<int64_t> kept(size_t(packed.rows), 0);
    Status status = read_bitmap(packed, matrix, kept);
    if (status != OK) return status;
    if (packed.values_bytes != expected_bytes(packed, kept) || (packed.values_bytes && !packed.values)) return BAD_LENGTH;
    if (packed.kind >= 2 && (status = read_scales(packed, matrix)) != OK) return status;
    if ((status = read_order(packed, matrix)) != OK) return status;
    const bool nibbles = packed.kind == 3;
    if (choose && windows_are_faster(matrix, nibbles)) matrix.layout = nibbles ? W16_I4 : W16_I8;
    if (matrix.layout == W16_I8 || matrix.layout == W16_I4) return fill_windows(packed, matrix, kept);
    return packed.kind == 3 ? fill_nibbles(packed, matrix, kept) : fill_plain(packed, matrix, kept);
}

// Floats of one chunk of a row; `values` moves on.
void decode_chunk(const Matrix& matrix, uint64_t word, float scale, const uint8_t*& values, float* out) {
    std::memset(out, 0, CHUNK * sizeof(float));
    int64_t index = 0;
    for (; word; word &= word - 1, index++) {
        float value = 0;
        if (matrix.layout == BMP_F32) std::memcpy(&value, values + index * 4, 4);
        if (matrix.layout == BMP_BF16) {
            uint16_t half;
            std::memcpy(&half, values + index * 2, 2);
            value = bf16_to_float(half);
        }
        if (matrix.layout == BMP_I8) value = scale * float(int(values[index]) - 128);
        if (matrix.layout == BMP_I4) value = scale * float(int(nibble(values, index)) - 8);
        out[__builtin_ctzll(word)] = value;
    }
    values += matrix.layout == BMP_F32 ? index * 4 : matrix.layout == BMP_BF16 ? index * 2 : 0;
    values += matrix.layout == BMP_I8 ? index : matrix.layout == BMP_I4 ? (index + 1) / 2 : 0;
}

void decode_dense(const Matrix& matrix, int64_t row, float* out) {
    const int64_t width = matrix.padded(), first = row * width;
    if (matrix.layout == DENSE_F32) std::memcpy(out, matrix.values.as<float>() + first, size_t(width) * 4);
    if (matrix.layout == DENSE_BF16) {
        const uint16_t* from = matrix.values.as<uint16_t>() + first;
        for (int64_t i = 0; i < width; i++) out[i] = bf16_to_float(from[i]);
    }
    if (matrix.layout != DENSE_I8) return;
    const uint8_t* from = matrix.values.as<uint8_t>() + first;
    for (int64_t group = 0; group < matrix.groups; group++) {
        const float scale = scale_of(matrix, row, group);
        const int64_t end = std::min((group + 1) * GROUP, width);
        for (int64_t i = group * GROUP; i < end; i++) out[i] = float(int(from[i]) - 128) * scale;
    }
}

void decode_windows(const Matrix& matrix, int64_t row, float* out) {
    std::memset(out, 0, size_t(matrix.padded()) * sizeof(float));
    for (int64_t window = 0; window < matrix.padded() / WINDOW; window++)
        for (int32_t slot = 0; slot < matrix.slots; slot++) {
            int64_t column;
            int32_t code;
            get_slot(matrix, row, window, slot, column, code);
            if (code) out[column] = float(code) * scale_of(matrix, row, column / GROUP);
        }
    if (matrix.overflow_start.empty()) return;
    for (int64_t i = matrix.overflow_start[size_t(row)]; i < matrix.overflow_start[size_t(row) + 1]; i++)
        out[matrix.overflow[size_t(i)].column] = matrix.overflow[size_t(i)].value;
}

void skip_rows(const Matrix& matrix, int64_t from, int64_t to, const uint8_t*& values) {
    const auto* words = matrix.bitmap.as<uint64_t>();
    for (int64_t i = from * matrix.chunks; i < to * matrix.chunks; i++) {
        const int64_t count = __builtin_popcountll(words[i]);
        values += matrix.layout == BMP_F32    ? count * 4
                  : matrix.layout == BMP_BF16 ? count * 2
                  : matrix.layout == BMP_I8   ? count
                                              : (count + 1) / 2;
    }
}

}  // namespace

int64_t Matrix::bytes() const {
    return values.size() + bitmap.size() + scales.size() + int64_t(overflow.size() * sizeof(Overflow)) +
           int64_t(order.size() * sizeof(int32_t)) + int64_t(row_start.size() * sizeof(uint32_t));
}

float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = (half >> 10) & 31, mantissa = half & 0x3ff;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(float(mantissa), -24);
    const uint32_t bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

float bf16_to_float(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

void decode_rows(const Matrix& matrix, int64_t first, int64_t count, float* out) {
    const bool bitmap = matrix.layout >= BMP_F32 && matrix.layout <= BMP_I4;
    const bool scaled = matrix.layout == BMP_I8 || matrix.layout == BMP_I4;
    const int64_t block = first / BLOCK;
    const uint8_t* values = bitmap ? matrix.values.as<uint8_t>() + matrix.start[size_t(block)] : nullptr;
    if (bitmap) skip_rows(matrix, block * BLOCK, first, values);
    for (int64_t row = first; row < first + count; row++, out += matrix.padded()) {
        if (matrix.layout <= DENSE_I8) decode_dense(matrix, row, out);
        if (matrix.layout >= W16_I8) decode_windows(matrix, row, out);
        for (int64_t chunk = 0; bitmap && chunk < matrix.chunks; chunk++)
            decode_chunk(matrix, matrix.bitmap.as<uint64_t>()[row * matrix.chunks + chunk],
                         scaled ? scale_of(matrix, row, chunk * CHUNK / GROUP) : 1.0f, values, out + chunk * CHUNK);
    }
}

Status build(const Packed& packed, int32_t layout, std::unique_ptr<Matrix>& out) try {
    if (packed.kind < 0 || packed.kind > 3 || layout < 0 || layout > 3 || !packed.bitmap) return BAD_ARGUMENT;
    if (packed.bitmap_bytes < 0 || packed.values_bytes < 0) return BAD_ARGUMENT;
    if (packed.kind < 2 && layout != 0) return BAD_ARGUMENT;
    auto matrix = std::make_unique<Matrix>();
    const Status status = set_shape(*matrix, packed.rows, packed.columns);
    if (status != OK) return status;
    matrix->quantised_input = layout > 0;
    matrix->layout = layout == 2 ? (packed.kind == 2 ? W16_I8 : W16_I4) : Layout(BMP_F32 + packed.kind);
    const Status filled = fill(packed, *matrix, layout == 3);
    if (filled == OK) out = std::move(matrix);
    return filled;
} catch (const std::bad_alloc&) {
    return NO_MEMORY;
}

Status build_dense(const Packed& packed, std::unique_ptr<Matrix>& out) try {
    if (packed.kind < 0 || packed.kind > 2 || !packed.values) return BAD_ARGUMENT;
    auto matrix = std::make_unique<Matrix>();
    Status status = set_shape(*matrix, packed.rows, packed.columns);
    if (status != OK) return status;
    const int64_t width = packed.kind == 0 ? 4 : packed.kind == 1 ? 2 : 1, columns = packed.columns * width;
    if (packed.values_bytes != packed.rows * columns) return BAD_LENGTH;
    matrix->layout = Layout(DENSE_F32 + packed.kind);
    matrix->kept = packed.rows * packed.columns;
    matrix->quantised_input = packed.kind == 2;
    if (!matrix->values.allocate(packed.rows * matrix->padded() * width)) return NO_MEMORY;
    if (packed.kind == 2 && (status = read_scales(packed, *matrix)) != OK) return status;
    auto* to = matrix->values.as<uint8_t>();
    if (packed.kind == 2) std::memset(to, 128, size_t(matrix->values.size()));
    for (int64_t row = 0; row < packed.rows; row++, to += matrix->padded() * width) {
        std::memcpy(to, static_cast<const uint8_t*>(packed.values) + row * columns, size_t(columns));
        for (int64_t i = 0; packed.kind == 2 && i < columns; i++) to[i] ^= 0x80;
    }
    out = std::move(matrix);
    return OK;
} catch (const std::bad_alloc&) {
    return NO_MEMORY;
}

}  // namespace prunus
