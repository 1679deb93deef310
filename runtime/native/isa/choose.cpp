#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace edgekv {

const Kernels* find_kernels(const char* name) {
    const Kernels* (*const choices[])() = {amx_kernels,      avx512_kernels, avx2_kernels,
                                           neon_dot_kernels, neon_kernels,   scalar_kernels};
    if (!name || !*name) name = std::getenv("EDGEKV_ISA");
    for (auto choice : choices) {
        const Kernels* kernels = choice();
        if (kernels && (!name || !*name || !std::strcmp(name, kernels->name))) return kernels;
    }
    return nullptr;
}

}  // namespace edgekv
