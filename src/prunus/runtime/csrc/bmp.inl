// bmp: one bit per weight and the kept values, row after row. Included by isa.cpp only.
//
// Rows need no alignment of their own: the pointer to the values moves on by the number of set bits, so a block of rows
// is one stream, and the processor overlaps rows by itself.

namespace bmp {

#if defined(PRUNUS_AVX512)

float row_f32(const uint64_t* words, int64_t chunks, const float* x, const uint8_t*& at) {
    const float* values = reinterpret_cast<const float*>(at);
    __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
    for (int64_t chunk = 0; chunk < chunks; chunk++, x += CHUNK) {
        const uint64_t word = words[chunk];
        ahead(values);
        ahead(values + 16);
        const uint32_t k0 = word & 0xffff, k1 = word >> 16 & 0xffff, k2 = word >> 32 & 0xffff, k3 = uint32_t(word >> 48);
        const int n0 = _mm_popcnt_u32(k0), n1 = n0 + _mm_popcnt_u32(k1), n2 = n1 + _mm_popcnt_u32(k2);
        a = _mm512_fmadd_ps(_mm512_maskz_expand_ps(__mmask16(k0), _mm512_loadu_ps(values)), _mm512_loadu_ps(x), a);
        b = _mm512_fmadd_ps(_mm512_maskz_expand_ps(__mmask16(k1), _mm512_loadu_ps(values + n0)),
                            _mm512_loadu_ps(x + 16), b);
        c = _mm512_fmadd_ps(_mm512_maskz_expand_ps(__mmask16(k2), _mm512_loadu_ps(values + n1)),
                            _mm512_loadu_ps(x + 32), c);
        d = _mm512_fmadd_ps(_mm512_maskz_expand_ps(__mmask16(k3), _mm512_loadu_ps(values + n2)),
                            _mm512_loadu_ps(x + 48), d);
        values += _mm_popcnt_u64(word);
    }
    at = reinterpret_cast<const uint8_t*>(values);
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)));
}

float row_bf16(const uint64_t* words, int64_t chunks, const float* x, const uint8_t*& at) {
    const uint16_t* values = reinterpret_cast<const uint16_t*>(at);
    const __m512i odd = _mm512_set1_epi32(int(0xffff0000u));
    __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
    for (int64_t chunk = 0; chunk < chunks; chunk++, x += CHUNK) {
        const uint64_t word = words[chunk];
        ahead(values);
        const int n = _mm_popcnt_u32(uint32_t(word));
        const __m512i low = _mm512_maskz_expand_epi16(__mmask32(word), _mm512_loadu_si512(values));
        const __m512i high = _mm512_maskz_expand_epi16(__mmask32(word >> 32), _mm512_loadu_si512(values + n));
        a = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(low, 16)), _mm512_loadu_ps(x), a);
        b = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(low, odd)), _mm512_loadu_ps(x + 16), b);
        c = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(high, 16)), _mm512_loadu_ps(x + 32), c);
        d = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(high, odd)), _mm512_loadu_ps(x + 48), d);
        values += _mm_popcnt_u64(word);
    }
    at = reinterpret_cast<const uint8_t*>(values);
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)));
}

#elif defined(PRUNUS_AVX2)

float row_f32(const uint64_t* words, int64_t chunks, const float* x, const uint8_t*& at) {
    const float* values = reinterpret_cast<const float*>(at);
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        uint64_t word = words[chunk];
        ahead(values);
        for (int part = 0; part < 8; part++, word >>= 8, x += 8) {
            const uint8_t mask = uint8_t(word);
            const auto* position = reinterpret_cast<const __m128i*>(TABLES.position[mask]);
            const auto* keep = reinterpret_cast<const __m128i*>(TABLES.keep[mask]);
            const __m256 wide = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values),
                                                         _mm256_cvtepu8_epi32(_mm_loadl_epi64(position)));
            const __m256 kept = _mm256_castsi256_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(keep)));
            sum[part & 1] = _mm256_fmadd_ps(_mm256_and_ps(wide, kept), _mm256_loadu_ps(x), sum[part & 1]);
            values += TABLES.count[mask];
        }
    }
    at = reinterpret_cast<const uint8_t*>(values);
    return total((vf)_mm256_add_ps(sum[0], sum[1]));
}

float row_bf16(const uint64_t* words, int64_t chunks, const float* x, const uint8_t*& at) {
    const uint16_t* values = reinterpret_cast<const uint16_t*>(at);
    const __m256i odd = _mm256_set1_epi32(int(0xffff0000u));
    __m256 a = _mm256_setzero_ps(), b = a;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        uint64_t word = words[chunk];
        ahead(values);
        for (int part = 0; part < 4; part++, word >>= 16, x += 16) {
            const uint8_t first = uint8_t(word), second = uint8_t(word >> 8);
            const __m128i low = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)),
                                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(TABLES.halves[first])));
            values += TABLES.count[first];
            const __m128i high =
                _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)),
                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(TABLES.halves[second])));
            values += TABLES.count[second];
            const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
            a = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)), _mm256_loadu_ps(x), a);
            b = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(both, odd)), _mm256_loadu_ps(x + 8), b);
        }
    }
    at = reinterpret_cast<const uint8_t*>(values);
    return total((vf)_mm256_add_ps(a, b));
}

#else

float row_f32(const uint64_t* words, int64_t chunks, const float* x, const uint8_t*& at) {
    float sum[2] = {0, 0};
    for (int64_t chunk = 0; chunk < chunks; chunk++, x += CHUNK) {
        int turn = 0;
        for (uint64_t word = words[chunk]; word; word &= word - 1, at += 4) {
            float value;
            memcpy(&value, at, 4);
            sum[turn ^= 1] += value * x[__builtin_ctzll(word)];
        }
    }
    return sum[0] + sum[1];
}

float row_bf16(const uint64_t* words, int64_t chunks, const float* x, const uint8_t*& at) {
    float sum[2] = {0, 0};
    for (int64_t chunk = 0; chunk < chunks; chunk++, x += CHUNK) {
        int turn = 0;
        for (uint64_t word = words[chunk]; word; word &= word - 1, at += 2) {
            uint16_t value;
            memcpy(&value, at, 2);
            sum[turn ^= 1] += bf16_to_float(value) * x[__builtin_ctzll(word)];
        }
    }
    return sum[0] + sum[1];
}

#endif

template <float ROW(const uint64_t*, int64_t, const float*, const uint8_t*&)>
void rows(const Matrix& matrix, const float* x, float* y, int64_t first, int64_t last) {
    const uint8_t* at = matrix.values.as<uint8_t>() + matrix.start[size_t(first / BLOCK)];
    const uint64_t* words = matrix.bitmap.as<uint64_t>() + first * matrix.chunks;
    for (int64_t row = first; row < last; row++, words += matrix.chunks) y[row] = ROW(words, matrix.chunks, x, at);
}

// int8 and int4 values with float activations: what the rounding of activations is measured against.
template <bool NIBBLES> void rows_codes(const Matrix& matrix, const float* x, float* y, int64_t first, int64_t last) {
    const uint8_t* at = matrix.values.as<uint8_t>() + matrix.start[size_t(first / BLOCK)];
    const uint64_t* words = matrix.bitmap.as<uint64_t>() + first * matrix.chunks;
    for (int64_t row = first; row < last; row++, words += matrix.chunks) {
        float sum = 0;
        for (int64_t chunk = 0; chunk < matrix.chunks; chunk++) {
            float part = 0;
            int64_t i = 0;
            for (uint64_t word = words[chunk]; word; word &= word - 1, i++) {
                const int code = NIBBLES ? (at[i / 2] >> (4 * (i % 2)) & 15) - 8 : int(at[i]) - 128;
                part += float(code) * x[chunk * CHUNK + __builtin_ctzll(word)];
            }
            at += NIBBLES ? (i + 1) / 2 : i;
            sum += part * half_value(*scales_at(matrix, row, chunk * CHUNK / GROUP));
        }
        y[row] = sum;
    }
}

#if defined(PRUNUS_AVX512)

// 64 weights as bytes w + offset; the free places hold the offset, which is a weight of zero.
template <bool NIBBLES> inline __m512i expand(uint64_t word, const uint8_t*& at) {
    const int64_t count = _mm_popcnt_u64(word);
    if (!NIBBLES) {
        const __m512i packed = _mm512_loadu_si512(at);
        at += count;
        return _mm512_mask_expand_epi8(_mm512_set1_epi8(char(128)), word, packed);
    }
    const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    at += (count + 1) / 2;
    // (pairs | pairs << 4) & 0x0f0f
    const __m512i codes =
        _mm512_ternarylogic_epi32(pairs, _mm512_slli_epi16(pairs, 4), _mm512_set1_epi16(0x0f0f), 0xa8);
    return _mm512_mask_expand_epi8(_mm512_set1_epi8(8), word, codes);
}

// Rows that are multiplied together: one row alone is a chain of sums, each waiting for the one before.
constexpr int TOGETHER = 4;

// The sum over the lanes of each of four vectors.
inline __m128 totals(const __m512* rows) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(rows[0], rows[1]), _mm512_unpackhi_ps(rows[0], rows[1]));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(rows[2], rows[3]), _mm512_unpackhi_ps(rows[2], rows[3]));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Where four rows are being read.
struct Reading {
    const uint8_t* at[TOGETHER];
    const uint64_t* words[TOGETHER];

    Reading(const Matrix& matrix, int64_t row, int64_t last) {
        for (int i = 0; i < TOGETHER; i++) {
            const int64_t mine = row + i < last ? row + i : last - 1;  // behind the end the last row once more
            at[i] = matrix.values.as<uint8_t>() + matrix.start[size_t(mine / BLOCK)] + matrix.row_start[size_t(mine)];
            words[i] = matrix.bitmap.as<uint64_t>() + mine * matrix.chunks;
        }
    }
};

// part += scale of q * (sum of (w + offset) * q - offset * sum of q): unsigned times signed bytes, as VPDPBUSD wants it.
template <bool NIBBLES> inline void meet(Reading& rows, const Input& in, int64_t chunk, __m512* part) {
    const __m512i q = _mm512_loadu_si512(in.q + chunk * CHUNK);
    const __m512i start = _mm512_loadu_si512((NIBBLES ? in.minus8 : in.minus128) + chunk * CHUNK / 4);
    const __m512 scale = _mm512_set1_ps(in.scale[chunk]);
    for (int i = 0; i < TOGETHER; i++) {
        ahead(rows.at[i]);
        const __m512i dot = _mm512_dpbusd_epi32(start, expand<NIBBLES>(rows.words[i][chunk], rows.at[i]), q);
        part[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, part[i]);
    }
}

inline void weigh(const uint16_t* scales, const __m512* part, __m512* sum) {
    alignas(16) float scale[TOGETHER];
    _mm_store_ps(scale, _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales))));
    for (int i = 0; i < TOGETHER; i++) sum[i] = _mm512_fmadd_ps(part[i], _mm512_set1_ps(scale[i]), sum[i]);
}

template <bool NIBBLES> void rows_rounded(const Matrix& matrix, const Input& in, float* y, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += TOGETHER) {
        Reading rows(matrix, row, last);
        const uint16_t* scales = scales_at(matrix, row, 0);
        __m512 sum[TOGETHER] = {};
        int64_t chunk = 0;
        for (; chunk + 2 <= matrix.chunks; chunk += 2, scales += BLOCK) {
            __m512 part[TOGETHER] = {};
            meet<NIBBLES>(rows, in, chunk, part);
            meet<NIBBLES>(rows, in, chunk + 1, part);
            weigh(scales, part, sum);
        }
        if (chunk < matrix.chunks) {
            __m512 part[TOGETHER] = {};
            meet<NIBBLES>(rows, in, chunk, part);
            weigh(scales, part, sum);
        }
        const int64_t count = last - row < TOGETHER ? last - row : TOGETHER;
        _mm_mask_storeu_ps(y + row, __mmask8((1 << count) - 1), totals(sum));
    }
}

#else

template <bool NIBBLES> void rows_rounded(const Matrix& matrix, const Input& in, float* y, int64_t first, int64_t last) {
    const uint8_t* at = matrix.values.as<uint8_t>() + matrix.start[size_t(first / BLOCK)];
    const uint64_t* words = matrix.bitmap.as<uint64_t>() + first * matrix.chunks;
    for (int64_t row = first; row < last; row++, words += matrix.chunks) {
        float sum = 0;
        for (int64_t chunk = 0; chunk < matrix.chunks; chunk++) {
            int32_t dot = 0;
            int64_t i = 0;
            for (uint64_t word = words[chunk]; word; word &= word - 1, i++) {
                const int code = NIBBLES ? (at[i / 2] >> (4 * (i % 2)) & 15) - 8 : int(at[i]) - 128;
                dot += code * in.q[chunk * CHUNK + __builtin_ctzll(word)];
            }
            at += NIBBLES ? (i + 1) / 2 : i;
            sum += float(dot) * in.scale[chunk] * half_value(*scales_at(matrix, row, chunk * CHUNK / GROUP));
        }
        y[row] = sum;
    }
}

#endif

void matvec(const Matrix& matrix, const Input& in, float* y, int64_t first, int64_t last) {
    if (matrix.layout == BMP_F32) rows<row_f32>(matrix, in.x, y, first, last);
    if (matrix.layout == BMP_BF16) rows<row_bf16>(matrix, in.x, y, first, last);
    if (matrix.layout == BMP_I8 && !matrix.quantised_input) rows_codes<false>(matrix, in.x, y, first, last);
    if (matrix.layout == BMP_I4 && !matrix.quantised_input) rows_codes<true>(matrix, in.x, y, first, last);
    if (matrix.layout == BMP_I8 && matrix.quantised_input) rows_rounded<false>(matrix, in, y, first, last);
    if (matrix.layout == BMP_I4 && matrix.quantised_input) rows_rounded<true>(matrix, in, y, first, last);
}

}  // namespace bmp
