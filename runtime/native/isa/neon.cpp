#include "kernels.h"

#ifdef __aarch64__
#include "isa/neon.h"

namespace edgekv {

const Kernels* neon_kernels() {
    static const Kernels kernels{"neon",   decode_run, blocked_pages, blocked_own, merge,
                                 sum_mass, pack_warm,  to_half,       read_bytes, checksum,
                                 rms_norm, swiglu,     geglu, rotary};
    return &kernels;
}

}  // namespace edgekv

#else
namespace edgekv {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace edgekv
#endif
