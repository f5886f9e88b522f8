// Many tokens at once: activations lie as [columns][64 tokens], so a weight meets 64 tokens in a few vectors, and all
// else in a transformer is done token by token in the lanes of a vector. Included by isa.cpp only.

namespace tile {

constexpr int WIDE = TILE / LANES < 8 ? TILE / LANES : 8;  // vectors of tokens that a kept weight meets
constexpr int SETS = 8 / WIDE;                             // independent sums, to hide the latency of a multiply-add
constexpr int NARROW = LANES == 16 ? 4 : 2;                // vectors of tokens beside several rows or keys
constexpr int64_t PART = NARROW * LANES;                   // tokens of these
constexpr int ROWS = 6;

// Kept weights of one row and group with their columns in it.
inline int append_chunk(const Matrix& matrix, uint64_t word, int64_t base, const uint8_t*& at, uint8_t* id, float* value) {
    const int count = __builtin_popcountll(word);
#if defined(PRUNUS_AVX512)
    alignas(64) static const uint8_t COUNT[64] = {
        0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
        22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
        44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    const __m512i columns = _mm512_add_epi8(_mm512_load_si512(COUNT), _mm512_set1_epi8(char(base)));
    _mm512_storeu_si512(id, _mm512_maskz_compress_epi8(word, columns));
#else
    for (int i = 0; word; word &= word - 1) id[i++] = uint8_t(base + __builtin_ctzll(word));
#endif
    if (matrix.layout == BMP_F32) {
        memcpy(value, at, size_t(count) * 4);
        at += count * 4;
    } else if (matrix.layout == BMP_BF16) {
        for (int i = 0; i < count; i++) {
            uint16_t half;
            memcpy(&half, at + 2 * i, 2);
            value[i] = bf16_to_float(half);
        }
        at += count * 2;
    } else if (matrix.layout == BMP_I8) {
        for (int i = 0; i < count; i++) value[i] = float(int32_t(at[i]) - 128);
        at += count;
    } else {
        for (int i = 0; i < count; i++) value[i] = float(int32_t(at[i / 2] >> (4 * (i % 2)) & 15) - 8);
        at += (count + 1) / 2;
    }
    return count;
}

inline float group_scale(const Matrix& matrix, int64_t row, int64_t group) {
    return matrix.scales.size() ? half_value(*scales_at(matrix, row, group)) : 1.0f;
}

// The lists of 16 rows from a bitmap. List (row, group) begins at (row * groups + group) * GROUP.
void list_bitmap(const Matrix& matrix, int64_t first, int64_t last, const Lists& lists) {
    const uint8_t* at = matrix.values.as<uint8_t>() + matrix.start[size_t(first / BLOCK)];
    const uint64_t* words = matrix.bitmap.as<uint64_t>() + first * matrix.chunks;
    for (int64_t row = 0; row < last - first; row++)
        for (int64_t group = 0; group < matrix.groups; group++) {
            const int64_t list = row * matrix.groups + group, chunk = 2 * group;
            uint8_t* id = lists.id + list * LIST;
            float* value = lists.value + list * LIST;
            int count = append_chunk(matrix, *words++, 0, at, id, value);
            if (chunk + 1 < matrix.chunks) count += append_chunk(matrix, *words++, CHUNK, at, id + count, value + count);
            lists.count[list] = count;
            const float scale = group_scale(matrix, first + row, group);
            for (int i = 0; i < count; i++) value[i] *= scale;
        }
}

inline void push(const Lists& lists, int64_t list, uint8_t id, float value) {
    const int32_t count = lists.count[list]++;
    lists.id[list * LIST + count] = id;
    lists.value[list * LIST + count] = value;
}

// The slots of one quad (EACH = 4 for a row) or pair (2): values, then ids.
template <int EACH, bool NIBBLES>
inline void list_slots(const Matrix& matrix, const uint8_t* at, int64_t base, int64_t group, int64_t rows,
                       const float* scale, const Lists& lists) {
    constexpr int HALF = EACH * 8;
    const uint8_t* ids = at + (NIBBLES ? HALF : 2 * HALF);
    for (int i = 0; i < 2 * HALF && i / EACH < rows; i++) {
        const int shift = i < HALF ? 0 : 4, place = i & (HALF - 1);
        const int code = NIBBLES ? (at[place] >> shift & 15) - 8 : int(int8_t(at[i]));
        if (!code) continue;
        const int id = ids[place] >> shift & 15;
        push(lists, i / EACH * matrix.groups + group, uint8_t(base + id), float(code) * scale[i / EACH]);
    }
}

// The same from windows: one quad or pair at a time.
template <bool NIBBLES> void list_windows(const Matrix& matrix, int64_t first, int64_t last, const Lists& lists) {
    const uint8_t* at = matrix.values.as<uint8_t>() + matrix.start[size_t(first / BLOCK)];
    const int64_t rows = last - first, size = quad_values(NIBBLES);
    float scale[BLOCK] = {};
    for (int64_t list = 0; list < BLOCK * matrix.groups; list++) lists.count[list] = 0;
    for (int64_t window = 0; window < matrix.padded() / WINDOW; window++) {
        const int64_t base = window * WINDOW % GROUP, group = window * WINDOW / GROUP;
        for (int64_t row = 0; row < rows && base == 0; row++) scale[row] = half_value(*scales_at(matrix, first + row, group));
        for (int slot = 0; slot + 4 <= matrix.slots; slot += 4, at += size + 32)
            list_slots<4, NIBBLES>(matrix, at, base, group, rows, scale, lists);
        if (matrix.slots % 4 == 0) continue;
        list_slots<2, NIBBLES>(matrix, at, base, group, rows, scale, lists);
        at += size / 2 + 16;
    }
    if (matrix.overflow.empty()) return;
    for (int64_t row = first; row < last; row++)
        for (int64_t i = matrix.overflow_start[size_t(row)]; i < matrix.overflow_start[size_t(row) + 1]; i++) {
            const Overflow& entry = matrix.overflow[size_t(i)];
            push(lists, (row - first) * matrix.groups + entry.column / GROUP, uint8_t(entry.column % GROUP), entry.value);
        }
}

// out [64] += kept weights of one list times x [128][64].
inline void meet(const uint8_t* id, const float* value, int count, const float* x, float* out) {
    for (int64_t part = 0; part < TILE; part += WIDE * LANES) {
        vf sum[SETS][WIDE] = {};
        int i = 0;
        for (; i + SETS <= count; i += SETS)
            for (int set = 0; set < SETS; set++) {
                const float* from = x + id[i + set] * TILE + part;
                for (int j = 0; j < WIDE; j++) sum[set][j] += value[i + set] * load(from + j * LANES);
            }
        for (; i < count; i++)
            for (int j = 0; j < WIDE; j++) sum[0][j] += value[i] * load(x + id[i] * TILE + part + j * LANES);
        for (int j = 0; j < WIDE; j++) {
            for (int set = 1; set < SETS; set++) sum[0][j] += sum[set][j];
            store(out + part + j * LANES, load(out + part + j * LANES) + sum[0][j]);
        }
    }
}

// out [COUNT][64] += w [COUNT][stride] times x [columns][64].
template <int COUNT> void panel(const float* w, int64_t stride, int64_t columns, const float* x, float* out) {
    for (int64_t part = 0; part < TILE; part += PART) {
        vf sum[COUNT][NARROW] = {};
        for (int64_t column = 0; column < columns; column++) {
            vf tokens[NARROW];
            for (int j = 0; j < NARROW; j++) tokens[j] = load(x + column * TILE + part + j * LANES);
            for (int row = 0; row < COUNT; row++)
                for (int j = 0; j < NARROW; j++) sum[row][j] += w[row * stride + column] * tokens[j];
        }
        for (int row = 0; row < COUNT; row++)
            for (int j = 0; j < NARROW; j++) {
                float* to = out + row * TILE + part + j * LANES;
                store(to, load(to) + sum[row][j]);
            }
    }
}

void panels(const float* w, int64_t stride, int64_t rows, int64_t columns, const float* x, float* out) {
    int64_t row = 0;
    for (; row + ROWS <= rows; row += ROWS) panel<ROWS>(w + row * stride, stride, columns, x, out + row * TILE);
    for (; row + 2 <= rows; row += 2) panel<2>(w + row * stride, stride, columns, x, out + row * TILE);
    for (; row < rows; row++) panel<1>(w + row * stride, stride, columns, x, out + row * TILE);
}

void multiply(const Matrix& matrix, bool dense, const float* x, int64_t tiles, float* y, int64_t first, int64_t last,
              const Lists& lists) {
    const int64_t width = matrix.padded(), groups = matrix.groups;
    for (int64_t block = first; block < last; block += BLOCK) {
        const int64_t end = block + BLOCK < last ? block + BLOCK : last, rows = end - block;
        if (dense)
            decode_rows(matrix, block, rows, lists.value);
        else if (matrix.layout == W16_I8)
            list_windows<false>(matrix, block, end, lists);
        else if (matrix.layout == W16_I4)
            list_windows<true>(matrix, block, end, lists);
        else
            list_bitmap(matrix, block, end, lists);
        for (int64_t tile = 0; tile < tiles; tile++) {
            const float* from = x + tile * width * TILE;
            float* to = y + (tile * matrix.rows + block) * TILE;
            memset(to, 0, size_t(rows * TILE) * sizeof(float));
            for (int64_t group = 0; group < groups; group++, from += GROUP * TILE) {
                const int64_t left = width - group * GROUP, columns = left < GROUP ? left : GROUP;
                if (dense) panels(lists.value + group * GROUP, width, rows, columns, from, to);
                for (int64_t row = 0; row < rows && !dense; row++) {
                    const int64_t list = row * groups + group;
                    meet(lists.id + list * LIST, lists.value + list * LIST, lists.count[list], from, to + row * TILE);
                }
            }
        }
    }
}

// 1 / sqrt(mean of squares + eps) of each token.
void inverse_norms(const float* x, int64_t rows, float eps, float* out) {
    for (int64_t part = 0; part < TILE; part += LANES) {
        vf sum = vf{};
        for (int64_t row = 0; row < rows; row++) sum += load(x + row * TILE + part) * load(x + row * TILE + part);
        for (int i = 0; i < LANES; i++) out[part + i] = 1.0f / __builtin_sqrtf(sum[i] / float(rows) + eps);
    }
}

void scale_rows(const float* x, const float* inverse, const float* weight, int64_t rows, float* out) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t part = 0; part < TILE; part += LANES)
            store(out + row * TILE + part, load(x + row * TILE + part) * load(inverse + part) * weight[row]);
}

// Chunks [first, last) of stored columns, rounded as `vector::quantise` does if the matrix wants it.
void gather(const Matrix& matrix, const float* x, int64_t first, int64_t last, float* out) {
    for (int64_t chunk = first; chunk < last; chunk++) {
        float* to = out + chunk * CHUNK * TILE;
        for (int64_t i = 0; i < CHUNK; i++) {
            const int64_t column = chunk * CHUNK + i;
            if (column >= matrix.columns) {
                memset(to + i * TILE, 0, TILE * sizeof(float));
                continue;
            }
            const int64_t from = matrix.order.empty() ? column : matrix.order.data()[column];
            memcpy(to + i * TILE, x + from * TILE, TILE * sizeof(float));
        }
        if (!matrix.quantised_input) continue;
        for (int64_t part = 0; part < TILE; part += LANES) {
            vf most = vf{};
            for (int i = 0; i < CHUNK; i++) {
                const vf value = load(to + i * TILE + part);
                most = larger(most, larger(value, -value));
            }
            const vf inverse = choose_lanes(most > 1e-30f, 127.0f / most, vf{}), scale = most / 127.0f;
            const vf magic = splat(12582912.0f);
            for (int i = 0; i < CHUNK; i++) {
                const vf value = load(to + i * TILE + part);
                store(to + i * TILE + part, ((value * inverse + magic) - magic) * scale);
            }
        }
    }
}

void transpose(const float* x, int64_t stride, int64_t rows, int64_t columns, float* out, int64_t out_stride) {
    for (int64_t row = 0; row < rows; row += 8)
        for (int64_t column = 0; column < columns; column++)
            for (int64_t i = row; i < rows && i < row + 8; i++) out[column * out_stride + i] = x[i * stride + column];
}

// One head's vectors [dim][64]: norm, then rotation by tables [rotary][64].
void turn(float* x, const float* norm, float eps, int64_t dim, const float* cos, const float* sin, int64_t rotary) {
    if (norm) {
        float inverse[TILE];
        inverse_norms(x, dim, eps, inverse);
        scale_rows(x, inverse, norm, dim, x);
    }
    const int64_t half = rotary / 2 * TILE;
    for (int64_t i = 0; i < half; i += LANES) {
        const vf a = load(x + i), b = load(x + half + i);
        store(x + i, a * load(cos + i) - b * load(sin + i));
        store(x + half + i, b * load(cos + half + i) + a * load(sin + half + i));
    }
}

constexpr int KEYS = 16;

// Scores of KEYS keys for PART tokens: a row for each key.
inline void score(const TileAttention& a, const float* query, int64_t key, int64_t count, float (*out)[PART]) {
    for (int first = 0; first < KEYS; first += 4) {
        vf sum[4][NARROW] = {};
        const float* keys[4];
        for (int i = 0; i < 4; i++) keys[i] = a.keys + (first + i < count ? key + first + i : key) * a.head_dim;
        for (int64_t d = 0; d < a.head_dim; d++)
            for (int j = 0; j < NARROW; j++) {
                const vf tokens = load(query + d * TILE + j * LANES);
                for (int i = 0; i < 4; i++) sum[i][j] += keys[i][d] * tokens;
            }
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < NARROW; j++) store(&out[first + i][j * LANES], sum[i][j] * a.scale);
    }
}

inline void cap(const TileAttention& a, float (*scores)[PART]) {
    for (int i = 0; i < KEYS && a.softcap > 0; i++)
        for (int64_t j = 0; j < PART; j++) scores[i][j] = a.softcap * tanhf(scores[i][j] / a.softcap);
}

// Tokens [part, part + PART) of a tile; keys are met KEYS at a time with a running largest score.
void attend_part(const TileAttention& a, int64_t part) {
    const float* query = a.query + part;
    float *out = a.out + part, scores[KEYS][PART];
    vf most[NARROW], sums[NARROW] = {};
    vi position[NARROW];
    for (int j = 0; j < NARROW; j++) {
        most[j] = splat(-1e30f);
        for (int i = 0; i < LANES; i++) position[j][i] = int32_t(a.position + part + j * LANES + i);
    }
    for (int64_t d = 0; d < a.head_dim; d++)
        for (int j = 0; j < NARROW; j++) store(out + d * TILE + j * LANES, vf{});
    const int64_t end = a.position + (part + PART < a.count ? part + PART : a.count);
    const int64_t seen = a.window ? a.position + part + 1 - a.window : 0;
    for (int64_t key = seen > 0 ? seen : 0; key < end; key += KEYS) {
        const int64_t count = end - key < KEYS ? end - key : KEYS;
        score(a, query, key, count, scores);
        cap(a, scores);
        for (int j = 0; j < NARROW; j++) {
            vi open[KEYS];
            vf largest = most[j];
            for (int i = 0; i < count; i++) {
                const int32_t at = int32_t(key + i);
                open[i] = position[j] >= at;
                if (a.window) open[i] &= position[j] < at + int32_t(a.window);
                largest = larger(largest, choose_lanes(open[i], load(&scores[i][j * LANES]), splat(-1e30f)));
            }
            const vf shrink = exponential(most[j] - largest);
            sums[j] *= shrink;
            for (int i = 0; i < count; i++) {
                const vf weight =
                    choose_lanes(open[i], exponential(load(&scores[i][j * LANES]) - largest), vf{});
                store(&scores[i][j * LANES], weight);
                sums[j] += weight;
            }
            for (int64_t d = 0; d < a.head_dim; d++) {
                vf sum = load(out + d * TILE + j * LANES) * shrink;
                for (int i = 0; i < count; i++)
                    sum += a.values[(key + i) * a.head_dim + d] * load(&scores[i][j * LANES]);
                store(out + d * TILE + j * LANES, sum);
            }
            most[j] = largest;
        }
    }
    for (int64_t d = 0; d < a.head_dim; d++)
        for (int j = 0; j < NARROW; j++) {
            float* to = out + d * TILE + j * LANES;
            store(to, load(to) / larger(sums[j], splat(1e-30f)));
        }
}

void attend(const TileAttention& attention) {
    for (int64_t part = 0; part < attention.count; part += PART) attend_part(attention, part);
}

}  // namespace tile
