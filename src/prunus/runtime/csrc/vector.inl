// What a transformer does between two matrices. Included by isa.cpp only.

namespace vector {

void gather(const float* x, const int32_t* order, int64_t columns, int64_t padded, bool halves, float* out) {
    auto at = [&](int64_t i) { return i < columns ? x[order ? order[i] : i] : 0.0f; };
    if (!halves) {
        for (int64_t i = 0; i < padded; i++) out[i] = at(i);
        return;
    }
    for (int64_t i = 0; i < padded; i += 2 * LANES)
        for (int j = 0; j < LANES; j++) {
            out[i + j] = at(i + 2 * j);
            out[i + LANES + j] = at(i + 2 * j + 1);
        }
}

// -offset times the sum of every four neighbours: what unsigned bytes w + offset add to a product.
inline void offsets(const int8_t* q, int32_t* minus128, int32_t* minus8) {
#if defined(PRUNUS_AVX512)
    const __m512i bytes = _mm512_loadu_si512(q), none = _mm512_setzero_si512();
    const __m512i sum8 = _mm512_dpbusd_epi32(none, _mm512_set1_epi8(8), bytes);
    _mm512_storeu_si512(minus8, _mm512_sub_epi32(none, sum8));
    _mm512_storeu_si512(minus128, _mm512_sub_epi32(none, _mm512_slli_epi32(sum8, 4)));
#else
    (void)q, (void)minus128, (void)minus8;  // the other kernels multiply signed bytes
#endif
}

void quantise(const float* x, int64_t padded, int8_t* q, float* scale, int32_t* minus128, int32_t* minus8) {
    for (int64_t chunk = 0; chunk < padded / CHUNK; chunk++, x += CHUNK, q += CHUNK) {
        vf most = vf{};
        for (int i = 0; i < CHUNK; i += LANES) most = larger(most, larger(load(x + i), -load(x + i)));
        float largest = 0;
        for (int i = 0; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
        const float inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;  // below it the quotient is infinite
        for (int i = 0; i < CHUNK; i += LANES) {
            const vf magic = splat(12582912.0f);  // rounds half to even
            const vi rounded = __builtin_convertvector((load(x + i) * inverse + magic) - magic, vi);
            typedef int8_t vb __attribute__((vector_size(LANES)));
            const vb bytes = __builtin_convertvector(rounded, vb);
            memcpy(q + i, &bytes, sizeof bytes);
        }
        scale[chunk] = largest / 127.0f;
        offsets(q, minus128 + chunk * CHUNK / 4, minus8 + chunk * CHUNK / 4);
    }
}

void rms_norm(const float* x, const float* weight, float eps, int64_t size, float* out) {
    vf sum = vf{};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sum += load(x + i) * load(x + i);
    float squares = total(sum);
    for (; i < size; i++) squares += x[i] * x[i];
    const float inverse = 1.0f / __builtin_sqrtf(squares / float(size) + eps);
    for (i = 0; i < size; i++) out[i] = x[i] * inverse * weight[i];
}

void add(const float* x, int64_t size, float* out) {
    for (int64_t i = 0; i < size; i++) out[i] += x[i];
}

inline vf activate(Activation kind, vf x) {
    if (kind == SILU) return x * sigmoid(x);
    // (1 + tanh z) / 2 = sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
    if (kind == GELU_TANH) return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
    if (kind == GELU) {
        for (int i = 0; i < LANES; i++) x[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
        return x;
    }
    const vf positive = larger(x, vf{});
    return kind == RELU ? positive : positive * positive;
}

// Both buffers are readable and writable up to a multiple of LANES.
void gate(Activation kind, const float* gate, int64_t size, float* up) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(up + i, load(up + i) * activate(kind, load(gate + i)));
    for (; i < size; i++) up[i] *= activate(kind, splat(gate[i]))[0];
}

inline float product(const float* a, const float* b, int64_t size) {
    vf sum = vf{};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sum += load(a + i) * load(b + i);
    float rest = 0;
    for (; i < size; i++) rest += a[i] * b[i];
    return total(sum) + rest;
}

void attend(const Attention& a) {
    const int64_t count = a.to - a.from, size = a.head_dim;
    float largest = -3.4e38f;
    for (int64_t i = 0; i < count; i++) {
        float score = product(a.query, a.keys + (a.from + i) * size, size) * a.scale;
        if (a.softcap > 0) score = a.softcap * tanhf(score / a.softcap);
        a.scores[i] = score;
        largest = score > largest ? score : largest;
    }
    vf sums = vf{};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const vf weight = exponential(load(a.scores + i) - largest);
        store(a.scores + i, weight);
        sums += weight;
    }
    float sum = total(sums);
    for (; i < count; i++) sum += a.scores[i] = exponential(splat(a.scores[i] - largest))[0];
    for (int64_t d = 0; d < size; d++) a.out[d] = 0;
    for (i = 0; i < count; i++) {
        const float weight = a.scores[i] / sum;
        const float* value = a.values + (a.from + i) * size;
        for (int64_t d = 0; d < size; d++) a.out[d] += weight * value[d];
    }
}

}  // namespace vector
