// Dense matrices: the head, embeddings, and the baseline that a sparse format has to beat. Included by isa.cpp only.

namespace dense {

void rows_f32(const Matrix& matrix, const float* x, float* y, int64_t first, int64_t last) {
    const int64_t width = matrix.padded();
    for (int64_t row = first; row < last; row++) {
        const float* w = matrix.values.as<float>() + row * width;
        vf sum[4] = {};
        for (int64_t i = 0; i < width; i += 4 * LANES) {
            for (int j = 0; j < 4 * LANES; j += 16) ahead(w + i + j);
            for (int j = 0; j < 4; j++) sum[j] += load(w + i + j * LANES) * load(x + i + j * LANES);
        }
        y[row] = total((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
}

// `x` lies even columns first in each vector of 16-bit values (on the portable path too: a vector of 4).
void rows_bf16(const Matrix& matrix, const float* x, float* y, int64_t first, int64_t last) {
    const int64_t width = matrix.padded();
    for (int64_t row = first; row < last; row++) {
        const uint16_t* w = matrix.values.as<uint16_t>() + row * width;
        vf sum[4] = {};
        for (int64_t i = 0; i < width; i += 4 * LANES) {
            for (int j = 0; j < 4 * LANES; j += 32) ahead(w + i + j);
            for (int j = 0; j < 4; j += 2) {
                vi pair;
                memcpy(&pair, w + i + j * LANES, sizeof pair);
                sum[j] += (vf)(pair << 16) * load(x + i + j * LANES);
                sum[j + 1] += (vf)(pair & int32_t(0xffff0000u)) * load(x + i + (j + 1) * LANES);
            }
        }
        y[row] = total((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
}

#if defined(PRUNUS_AVX512)

void rows_i8(const Matrix& matrix, const Input& in, float* y, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const uint8_t* w = matrix.values.as<uint8_t>() + row * matrix.padded();
        const uint16_t* scale = scales_at(matrix, row, 0);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t chunk = 0; chunk < matrix.chunks; scale += BLOCK) {
            __m512 part = _mm512_setzero_ps();
            const int64_t end = chunk + 2 < matrix.chunks ? chunk + 2 : matrix.chunks;
            for (; chunk < end; chunk++) {
                ahead(w + chunk * CHUNK);
                const __m512i start = _mm512_loadu_si512(in.minus128 + chunk * CHUNK / 4);
                const __m512i dot = _mm512_dpbusd_epi32(start, _mm512_loadu_si512(w + chunk * CHUNK),
                                                        _mm512_loadu_si512(in.q + chunk * CHUNK));
                part = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(in.scale[chunk]), part);
            }
            sum = _mm512_fmadd_ps(part, _mm512_cvtph_ps(_mm256_set1_epi16(short(*scale))), sum);
        }
        y[row] = _mm512_reduce_add_ps(sum);
    }
}

#elif defined(PRUNUS_AVX2)

void rows_i8(const Matrix& matrix, const Input& in, float* y, int64_t first, int64_t last) {
    const __m256i flip = _mm256_set1_epi8(char(128)), ones = _mm256_set1_epi16(1);
    for (int64_t row = first; row < last; row++) {
        const auto* w = reinterpret_cast<const __m256i*>(matrix.values.as<uint8_t>() + row * matrix.padded());
        const auto* q = reinterpret_cast<const __m256i*>(in.q);
        const uint16_t* scale = scales_at(matrix, row, 0);
        __m256 sum = _mm256_setzero_ps();
        for (int64_t chunk = 0; chunk < matrix.chunks; scale += BLOCK) {
            __m256 part = _mm256_setzero_ps();
            const int64_t end = chunk + 2 < matrix.chunks ? chunk + 2 : matrix.chunks;
            for (; chunk < end; chunk++, w += 2, q += 2) {
                ahead(w);
                // |w| * (q with the sign of w): two products fit into 16 bits, as neither is larger than 128 * 127.
                const __m256i a = _mm256_xor_si256(_mm256_loadu_si256(w), flip);
                const __m256i b = _mm256_xor_si256(_mm256_loadu_si256(w + 1), flip);
                const __m256i low = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(_mm256_loadu_si256(q), a));
                const __m256i high =
                    _mm256_maddubs_epi16(_mm256_abs_epi8(b), _mm256_sign_epi8(_mm256_loadu_si256(q + 1), b));
                const __m256i dot = _mm256_add_epi32(_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones));
                part = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(in.scale[chunk]), part);
            }
            sum = _mm256_fmadd_ps(part, _mm256_set1_ps(half_value(*scale)), sum);
        }
        y[row] = total((vf)sum);
    }
}

#else

void rows_i8(const Matrix& matrix, const Input& in, float* y, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const uint8_t* w = matrix.values.as<uint8_t>() + row * matrix.padded();
        float sum = 0;
        for (int64_t chunk = 0; chunk < matrix.chunks; chunk++) {
            int32_t dot = 0;
            for (int64_t i = chunk * CHUNK; i < (chunk + 1) * CHUNK; i++) dot += (int32_t(w[i]) - 128) * in.q[i];
            sum += float(dot) * in.scale[chunk] * half_value(*scales_at(matrix, row, chunk * CHUNK / GROUP));
        }
        y[row] = sum;
    }
}

#endif

void matvec(const Matrix& matrix, const Input& in, float* y, int64_t first, int64_t last) {
    if (matrix.layout == DENSE_F32) rows_f32(matrix, in.x, y, first, last);
    if (matrix.layout == DENSE_BF16) rows_bf16(matrix, in.x, y, first, last);
    if (matrix.layout == DENSE_I8) rows_i8(matrix, in, y, first, last);
}

}  // namespace dense
