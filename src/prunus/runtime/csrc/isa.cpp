// Compiled once per instruction set, with PRUNUS_ISA as its namespace. Of the C++ library only what is always inlined
// is used here: a function of it, compiled for a newer processor, could be the copy that the linker keeps for everyone.
#include <math.h>
#include <string.h>

#include "kernels.h"
#include "windows.h"

#if defined(PRUNUS_AVX2) || defined(PRUNUS_AVX512)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define PRUNUS_TEXT_(name) #name
#define PRUNUS_TEXT(name) PRUNUS_TEXT_(name)

namespace prunus {
namespace PRUNUS_ISA {
namespace {

#include "simd.inl"

#include "bmp.inl"
#include "dense.inl"
#include "tile.inl"
#include "vector.inl"
#include "w16.inl"

void matvec(const Matrix& matrix, const Input& input, float* y, int64_t first, int64_t last) {
    if (matrix.layout <= DENSE_I8)
        dense::matvec(matrix, input, y, first, last);
    else if (matrix.layout <= BMP_I4)
        bmp::matvec(matrix, input, y, first, last);
    else
        w16::matvec(matrix, input, y, first, last);
}

}  // namespace

extern const Kernels KERNELS;
const Kernels KERNELS = {
    PRUNUS_TEXT(PRUNUS_ISA),
#if defined(PRUNUS_AVX512)
    true, true,
#elif defined(PRUNUS_AVX2)
    false, true,
#else
    false, false,
#endif
    vector::gather,
    vector::quantise,
    matvec,
    vector::rms_norm,
    vector::add,
    vector::gate,
    vector::attend,
    {tile::multiply, tile::gather, tile::inverse_norms, tile::scale_rows, tile::transpose, tile::turn, tile::attend},
};

}  // namespace PRUNUS_ISA
}  // namespace prunus
