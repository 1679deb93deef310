#include "kernels.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include "isa/neon.h"

#ifdef __linux__
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
#endif

namespace edgekv {

const Kernels* neon_dot_kernels() {
    static const Kernels kernels{"neon-dot", decode_run, blocked_pages, blocked_own, merge,
                                 sum_mass,   pack_warm,  to_half,       read_bytes, checksum,
                                 rms_norm,   swiglu,     geglu, rotary};
#ifdef __linux__
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? &kernels : nullptr;
#else
    return &kernels;  // every 64-bit Apple processor since 2019
#endif
}

}  // namespace edgekv

#else
namespace edgekv {
const Kernels* neon_dot_kernels() { return nullptr; }
}  // namespace edgekv
#endif
