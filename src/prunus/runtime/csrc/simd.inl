// Vectors of the widest kind that this instruction set has, and what all kernels share. Included by isa.cpp only.

#if defined(PRUNUS_AVX512)
constexpr int LANES = 16;
#elif defined(PRUNUS_AVX2)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef float vfu __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline vf load(const float* from) { return *reinterpret_cast<const vfu*>(from); }
inline void store(float* to, vf value) { *reinterpret_cast<vfu*>(to) = value; }
inline vf splat(float value) { return vf{} + value; }

inline float total(vf value) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += value[i];
    return sum;
}

inline vf choose_lanes(vi condition, vf yes, vf no) {
    return (vf)((condition & (vi)yes) | (~condition & (vi)no));
}

inline vf larger(vf a, vf b) { return choose_lanes(a > b, a, b); }

// e^x for x <= 88, relative error below 2e-7: 2^n times a polynomial for the rest, |rest| <= log(2) / 2.
inline vf exponential(vf x) {
    x = larger(x, splat(-87.0f));
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const vf n = (x * 1.44269504f + magic) - magic;
    const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const vi power = (__builtin_convertvector(n, vi) + 127) << 23;
    return p * (vf)power;
}

inline vf sigmoid(vf x) {
    const vf limited = larger(x, splat(-80.0f));
    return 1.0f / (1.0f + exponential(-choose_lanes(limited > 80.0f, splat(80.0f), limited)));
}

// One row after another is a single stream; asking for what comes AHEAD keeps more of memory busy than the processor's own
// guess does. Addresses behind a buffer are harmless here.
constexpr int64_t AHEAD = 2048;
inline void ahead(const void* at) { __builtin_prefetch(static_cast<const char*>(at) + AHEAD); }

inline float half_value(uint16_t half) {
#if defined(PRUNUS_AVX2) || defined(PRUNUS_AVX512)
    return _cvtsh_ss(half);
#else
    return half_to_float(half);
#endif
}

// Scales of 16 rows for one group.
inline const uint16_t* scales_at(const Matrix& matrix, int64_t row, int64_t group) {
    return matrix.scales.as<uint16_t>() + (row / BLOCK * matrix.groups + group) * BLOCK + row % BLOCK;
}

// Which of 8 bytes a kept value goes to: position[mask][i] is the number of kept columns before column i.
struct Tables {
    uint8_t position[256][8];  // for dwords
    int8_t keep[256][8];       // -1 where kept
    uint8_t halves[256][16];   // byte shuffle of 8 words; 0x80 gives zero
    uint8_t count[256];
};

constexpr Tables make_tables() {
    Tables tables{};
    for (int mask = 0; mask < 256; mask++) {
        int count = 0;
        for (int i = 0; i < 8; i++) {
            const bool kept = mask >> i & 1;
            tables.position[mask][i] = uint8_t(count & 7);
            tables.keep[mask][i] = kept ? -1 : 0;
            tables.halves[mask][2 * i] = kept ? uint8_t(2 * count) : 0x80;
            tables.halves[mask][2 * i + 1] = kept ? uint8_t(2 * count + 1) : 0x80;
            count += kept;
        }
        tables.count[mask] = uint8_t(count);
    }
    return tables;
}

constexpr Tables TABLES = make_tables();
