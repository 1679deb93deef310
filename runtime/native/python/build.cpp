// What the kernels were compiled from, for and with, as `edgekv --version` says it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdlib>  // defines __GLIBC__ where the C library is that one
#include <string>

#include "python/views.h"

// Compiled by hand, as tools/arm64.sh does: nothing is known.
#ifndef EDGEKV_COMMIT
#define EDGEKV_COMMIT ""
#define EDGEKV_PROCESSOR "unknown"
#define EDGEKV_ISAS ""
#endif

namespace edgekv {
namespace {

std::string compiler() {
#ifdef __clang__
    return "Clang " + std::to_string(__clang_major__) + "." + std::to_string(__clang_minor__);
#elif defined(__GNUC__)
    return "GCC " + std::to_string(__GNUC__) + "." + std::to_string(__GNUC_MINOR__);
#else
    return "unknown";
#endif
}

std::string c_library() {
#ifdef __GLIBC__
    return "glibc " + std::to_string(__GLIBC__) + "." + std::to_string(__GLIBC_MINOR__);
#else
    return "";
#endif
}

}  // namespace

nb::dict build_facts() {
    nb::dict facts;
    facts["commit"] = EDGEKV_COMMIT;
    facts["processor"] = EDGEKV_PROCESSOR;
    facts["isas"] = EDGEKV_ISAS;
    facts["c_library"] = c_library();
    facts["compiler"] = compiler();
    return facts;
}

}  // namespace edgekv
