// Which of the compiled instruction sets this processor has.
#include <cstring>

#include "kernels.h"

#if defined(PRUNUS_HAS_NEON) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace prunus {

#define PRUNUS_DECLARE(name) \
    namespace name {         \
    extern const Kernels KERNELS; \
    }

PRUNUS_DECLARE(portable)
#if defined(PRUNUS_HAS_AVX2)
PRUNUS_DECLARE(avx2)
#endif
#if defined(PRUNUS_HAS_AVX512)
PRUNUS_DECLARE(avx512)
#endif
#if defined(PRUNUS_HAS_NEON)
PRUNUS_DECLARE(neon)
#endif

namespace {

#if defined(PRUNUS_HAS_NEON)
// The kernels are compiled for dot products of bytes, which ARM has from 8.2 on: before it (a Raspberry Pi 4's
// Cortex-A72) one of them would end the process.
bool dot_products() {
#if defined(__linux__)
    constexpr unsigned long ASIMDDP = 1UL << 20;  // HWCAP_ASIMDDP, which old headers lack
    return getauxval(AT_HWCAP) & ASIMDDP;
#elif defined(__APPLE__)
    return true;
#else
    return false;  // who cannot be asked gets the portable ones
#endif
}
#endif

struct Candidate {
    const Kernels* kernels;
    bool (*runs)();
};

// The fastest first.
const Candidate CANDIDATES[] = {
#if defined(PRUNUS_HAS_AVX512)
    {&avx512::KERNELS,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx2") &&
                __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
     }},
#endif
#if defined(PRUNUS_HAS_AVX2)
    {&avx2::KERNELS,
     [] {
         return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
     }},
#endif
#if defined(PRUNUS_HAS_NEON)
    {&neon::KERNELS, dot_products},
#endif
    {&portable::KERNELS, [] { return true; }},
};

}  // namespace

const Kernels* choose(const char* name) {
    for (const Candidate& candidate : CANDIDATES)
        if ((!*name || std::strcmp(name, candidate.kernels->name) == 0) && candidate.runs()) return candidate.kernels;
    return nullptr;
}

}  // namespace prunus
