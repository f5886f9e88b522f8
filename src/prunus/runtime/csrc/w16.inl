// w16: windows of 16 columns whose int8 activations fit a byte shuffle; windows.h has the layout. Included by isa.cpp.

namespace w16 {

// Kept weights without a slot, with the same rounded activations.
inline float rest(const Matrix& matrix, const Input& in, int64_t row) {
    float sum = 0;
    const Overflow* end = matrix.overflow.data() + matrix.overflow_start[size_t(row) + 1];
    for (const Overflow* at = matrix.overflow.data() + matrix.overflow_start[size_t(row)]; at < end; at++)
        sum += at->value * float(in.q[at->column]) * in.scale[at->column / CHUNK];
    return sum;
}

#if defined(PRUNUS_AVX2) || defined(PRUNUS_AVX512)

inline __m256i low_nibbles(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
inline __m256i high_nibbles(__m256i bytes) { return low_nibbles(_mm256_srli_epi16(bytes, 4)); }
inline __m256i load256(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

// 16 bytes with two nibbles each: the low ones, then the high ones.
inline __m256i split(const uint8_t* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return low_nibbles(_mm256_inserti128_si256(_mm256_castsi128_si256(bytes), _mm_srli_epi16(bytes, 4), 1));
}

// Sums of two products as 16-bit numbers. int8: |w| and q with the sign of w, so that nothing saturates.
inline __m256i products(__m256i weights, __m256i q) {
    return _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(q, weights));
}

// int4: codes are w + 8, so 8 q is taken off again.
inline __m256i products_codes(__m256i codes, __m256i q) {
    return _mm256_sub_epi16(_mm256_maddubs_epi16(codes, q), _mm256_maddubs_epi16(_mm256_set1_epi8(8), q));
}

struct Sums {
    __m256i low, high;    // int32: rows 0-7 and rows 8-15
    __m256i even, odd;    // int32: rows 0, 2 .. 14 and rows 1, 3 .. 15, of pairs
};

template <bool NIBBLES> inline void quad(const uint8_t*& at, __m256i table, Sums& sums) {
    ahead(at);
    ahead(at + quad_values(NIBBLES));
    const __m256i ones = _mm256_set1_epi16(1), ids = load256(at + quad_values(NIBBLES));
    const __m256i q_low = _mm256_shuffle_epi8(table, low_nibbles(ids));
    const __m256i q_high = _mm256_shuffle_epi8(table, high_nibbles(ids));
    __m256i low, high;
    if (NIBBLES) {
        const __m256i codes = load256(at);
        low = products_codes(low_nibbles(codes), q_low);
        high = products_codes(high_nibbles(codes), q_high);
    } else {
        low = products(load256(at), q_low);
        high = products(load256(at + 32), q_high);
    }
    sums.low = _mm256_add_epi32(sums.low, _mm256_madd_epi16(low, ones));
    sums.high = _mm256_add_epi32(sums.high, _mm256_madd_epi16(high, ones));
    at += quad_values(NIBBLES) + 32;
}

template <bool NIBBLES> inline void pair(const uint8_t*& at, __m256i table, Sums& sums) {
    const int64_t size = quad_values(NIBBLES) / 2;
    const __m256i q = _mm256_shuffle_epi8(table, split(at + size));
    const __m256i both = NIBBLES ? products_codes(split(at), q) : products(load256(at), q);
    sums.even = _mm256_add_epi32(sums.even, _mm256_madd_epi16(both, _mm256_set1_epi32(1)));
    sums.odd = _mm256_add_epi32(sums.odd, _mm256_madd_epi16(both, _mm256_set1_epi32(1 << 16)));
    at += size + 16;
}

template <bool NIBBLES> void blocks(const Matrix& matrix, const Input& in, float* y, int64_t first, int64_t last) {
    const int quads = matrix.slots / 4;
    const bool odd_pair = matrix.slots % 4;
    for (int64_t row = first; row < last; row += BLOCK) {
        const uint8_t* at = matrix.values.as<uint8_t>() + matrix.start[size_t(row / BLOCK)];
        __m256 out_low = _mm256_setzero_ps(), out_high = out_low;
        for (int64_t chunk = 0; chunk < matrix.chunks; chunk++) {
            Sums sums = {};
            for (int window = 0; window < CHUNK / WINDOW; window++) {
                const auto* q = reinterpret_cast<const __m128i*>(in.q + chunk * CHUNK + window * WINDOW);
                const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(q));
                for (int i = 0; i < quads; i++) quad<NIBBLES>(at, table, sums);
                if (odd_pair) pair<NIBBLES>(at, table, sums);
            }
            // Rows in order again: even and odd ones are interleaved, half by half.
            const __m256i a = _mm256_unpacklo_epi32(sums.even, sums.odd), b = _mm256_unpackhi_epi32(sums.even, sums.odd);
            const __m256i low = _mm256_add_epi32(sums.low, _mm256_permute2x128_si256(a, b, 0x20));
            const __m256i high = _mm256_add_epi32(sums.high, _mm256_permute2x128_si256(a, b, 0x31));
            const auto* scale = reinterpret_cast<const __m128i*>(scales_at(matrix, row, chunk * CHUNK / GROUP));
            const __m256 x = _mm256_set1_ps(in.scale[chunk]);
            out_low = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low), _mm256_mul_ps(x, _mm256_cvtph_ps(scale[0])), out_low);
            out_high = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), _mm256_mul_ps(x, _mm256_cvtph_ps(scale[1])), out_high);
        }
        float out[BLOCK];
        _mm256_storeu_ps(out, out_low);
        _mm256_storeu_ps(out + 8, out_high);
        const int64_t end = row + BLOCK < last ? row + BLOCK : last;
        for (int64_t i = row; i < end; i++) y[i] = out[i - row];
    }
}

#elif defined(__ARM_NEON)

inline int8x16_t low_nibbles(uint8x16_t bytes) { return vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15))); }
inline int8x16_t high_nibbles(uint8x16_t bytes) { return vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4)); }
inline int8x16_t look_up(int8x16_t table, int8x16_t ids) { return vqtbl1q_s8(table, vreinterpretq_u8_s8(ids)); }

// Values and activations of 16 slots: four rows of a quad, or eight rows of a pair. `size`: bytes of values.
template <bool NIBBLES> inline int8x16_t weights_at(const uint8_t* at, int part, int parts) {
    if (!NIBBLES) return vreinterpretq_s8_u8(vld1q_u8(at + part * 16));
    const uint8x16_t codes = vld1q_u8(at + part % (parts / 2) * 16);
    return vsubq_s8(part < parts / 2 ? low_nibbles(codes) : high_nibbles(codes), vdupq_n_s8(8));
}

inline int8x16_t activations_at(const uint8_t* ids, int8x16_t table, int part, int parts) {
    const uint8x16_t bytes = vld1q_u8(ids + part % (parts / 2) * 16);
    return look_up(table, part < parts / 2 ? low_nibbles(bytes) : high_nibbles(bytes));
}

// Adds groups of four products to four sums.
inline int32x4_t dot4(int32x4_t sum, int8x16_t a, int8x16_t b) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, a, b);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}

template <bool NIBBLES> void blocks(const Matrix& matrix, const Input& in, float* y, int64_t first, int64_t last) {
    const int quads = matrix.slots / 4;
    for (int64_t row = first; row < last; row += BLOCK) {
        const uint8_t* at = matrix.values.as<uint8_t>() + matrix.start[size_t(row / BLOCK)];
        float out[BLOCK] = {};
        for (int64_t chunk = 0; chunk < matrix.chunks; chunk++) {
            int32x4_t sums[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
            for (int window = 0; window < CHUNK / WINDOW; window++) {
                const int8x16_t table = vld1q_s8(in.q + chunk * CHUNK + window * WINDOW);
                for (int i = 0; i < quads; i++, at += quad_values(NIBBLES) + 32)
                    for (int part = 0; part < 4; part++)
                        sums[part] = dot4(sums[part], weights_at<NIBBLES>(at, part, 4),
                                          activations_at(at + quad_values(NIBBLES), table, part, 4));
                if (matrix.slots % 4 == 0) continue;
                const int64_t size = quad_values(NIBBLES) / 2;
                for (int part = 0; part < 2; part++) {
                    const int8x16_t w = weights_at<NIBBLES>(at, part, 2), q = activations_at(at + size, table, part, 2);
                    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(q)));
                    const int32x4_t high = vpaddlq_s16(vmull_high_s8(w, q));
                    sums[2 * part] = vaddq_s32(sums[2 * part], low);
                    sums[2 * part + 1] = vaddq_s32(sums[2 * part + 1], high);
                }
                at += size + 16;
            }
            int32_t whole[BLOCK];
            for (int part = 0; part < 4; part++) vst1q_s32(whole + 4 * part, sums[part]);
            const uint16_t* scale = scales_at(matrix, row, chunk * CHUNK / GROUP);
            for (int i = 0; i < BLOCK; i++) out[i] += float(whole[i]) * in.scale[chunk] * half_value(scale[i]);
        }
        const int64_t end = row + BLOCK < last ? row + BLOCK : last;
        for (int64_t i = row; i < end; i++) y[i] = out[i - row];
    }
}

#else

inline int nibble_of(const uint8_t* bytes, int index, int half) {
    return index < half ? bytes[index % half] & 15 : bytes[index % half] >> 4;
}

template <bool NIBBLES>
inline void slots_of(const uint8_t* at, int64_t size, int each, const int8_t* q, int32_t* sums) {
    const int half = each * 8;  // slots in low nibbles
    for (int i = 0; i < 2 * half; i++) {
        const int code = NIBBLES ? nibble_of(at, i, half) - 8 : int(int8_t(at[i]));
        sums[i / each] += code * q[nibble_of(at + size, i, half)];
    }
}

template <bool NIBBLES> void blocks(const Matrix& matrix, const Input& in, float* y, int64_t first, int64_t last) {
    const int64_t size = quad_values(NIBBLES);
    for (int64_t row = first; row < last; row += BLOCK) {
        const uint8_t* at = matrix.values.as<uint8_t>() + matrix.start[size_t(row / BLOCK)];
        float out[BLOCK] = {};
        for (int64_t chunk = 0; chunk < matrix.chunks; chunk++) {
            int32_t sums[BLOCK] = {};
            for (int window = 0; window < CHUNK / WINDOW; window++) {
                const int8_t* q = in.q + chunk * CHUNK + window * WINDOW;
                for (int i = 0; i < matrix.slots / 4; i++, at += size + 32) slots_of<NIBBLES>(at, size, 4, q, sums);
                if (matrix.slots % 4 == 0) continue;
                slots_of<NIBBLES>(at, size / 2, 2, q, sums);
                at += size / 2 + 16;
            }
            const uint16_t* scale = scales_at(matrix, row, chunk * CHUNK / GROUP);
            for (int i = 0; i < BLOCK; i++) out[i] += float(sums[i]) * in.scale[chunk] * half_value(scale[i]);
        }
        const int64_t end = row + BLOCK < last ? row + BLOCK : last;
        for (int64_t i = row; i < end; i++) y[i] = out[i - row];
    }
}

#endif

void matvec(const Matrix& matrix, const Input& in, float* y, int64_t first, int64_t last) {
    if (matrix.layout == W16_I8)
        blocks<false>(matrix, in, y, first, last);
    else
        blocks<true>(matrix, in, y, first, last);
    if (matrix.overflow.empty()) return;
    for (int64_t row = first; row < last; row++) y[row] += rest(matrix, in, row);
}

}  // namespace w16
