#!/usr/bin/env bash
# Cross-compile the native kernels and the ExecuTorch shim for aarch64 and run their tests under qemu: what a Raspberry Pi
# 4 (no dot products) and 5 (with them) would run, and 4-bit products also as with i8mm (qemu's `max`). Checks results, not
# speed. Needs root and apt-get; where something that it needs cannot be had, it says so in one line and succeeds.
# Usage: tools/arm64.sh [DIR]    (DIR keeps the environment; default build/arm64)
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$(realpath -m "${1:-build/arm64}")
python=.venv/bin/python
[ -x "$python" ] || python=python3

skip() { echo "arm64: skipped: $1"; exit 0; }
# shellcheck source=tools/emulate_arm64.sh
. tools/emulate_arm64.sh

# 1. compiler and emulator
install_emulator aarch64-linux-gnu-g++ gcc-aarch64-linux-gnu g++-aarch64-linux-gnu

# 2. an arm64 Python with what the tests import, unpacked beside the host's own
site=$dir/site
packages=(numpy xxhash msgspec pytest pytest-timeout hypothesis onnx onnxruntime)
unpacked() { [ "$(cat "$dir/.ready" 2>/dev/null)" = "${packages[*]}" ]; }
unpacked || echo "arm64: unpacking Python for aarch64 into $dir"
unpack_python "$dir"
if ! unpacked; then
  rm -rf "$site" "$dir/wheels"
  mkdir -p "$site"
  { fetch_wheels download -d "$dir/wheels" "${packages[@]}" &&
    fetch_wheels download -d "$dir/wheels" --no-deps executorch==1.5.1; } ||
    skip "the package index has no aarch64 wheels of what the tests import"
  "$python" - "$dir" <<'PY'
import sys, zipfile
from pathlib import Path

for wheel in Path(sys.argv[1], "wheels").glob("*.whl"):
    zipfile.ZipFile(wheel).extractall(Path(sys.argv[1], "site"))
PY
  echo "${packages[*]}" >"$dir/.ready"
fi

# 3. the kernels, into a copy of the tree
echo "arm64: compiling the kernels"
tree=$dir/tree
rm -rf "$tree" && mkdir -p "$tree"
cp -r edgekv export runtime device_profiles tests pyproject.toml "$tree"
rm -f "$tree"/runtime/_kernels*.so "$tree"/tests/conftest.py
nanobind=$("$python" -c 'import nanobind, pathlib; print(pathlib.Path(nanobind.__file__).parent)')
compile=(aarch64-linux-gnu-g++ -std=c++17 -O2 -fPIC)
mkdir -p "$dir/objects"
objects=() jobs=()
for source in $(find runtime/native -name "*.cpp" -not -path "*/executorch/*") "$nanobind/src/nb_combined.cpp"; do
  flags=(-fvisibility=hidden -fno-strict-aliasing -DNDEBUG -DNB_COMPACT_ASSERTIONS)
  case $source in
    */neon_dot.cpp) flags+=(-march=armv8.2-a+dotprod) ;;
    */neon_i8mm.cpp) flags+=(-march=armv8.2-a+dotprod+i8mm) ;;
  esac
  object=$dir/objects/${source//\//_}.o
  "${compile[@]}" "${flags[@]}" -Iruntime/native "-I$nanobind/include" "-I$nanobind/ext/robin_map/include" "-I$root/usr/include/$version" \
    "-I$root/usr/include" -c "$source" -o "$object" &
  objects+=("$object") jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job"; done
"${compile[@]}" -shared "${objects[@]}" -o "$tree/runtime/_kernels.abi3.so"

# 4. the tests
# shellcheck disable=SC2034
path=$site:$tree environment=(CXX=aarch64-linux-gnu-g++)
kernel_tests() { # Emulation is slow, so the kernels that are the same everywhere are left to the host's own tests.
  echo "arm64: the kernels on $1: $(emulated "$1" -c 'from edgekv.runtime.kernels.choose import load_kernels; print(load_kernels().isa())')"
  emulated "$1" -m pytest -q -p no:cacheprovider --hypothesis-profile=ci -k 'not numpy and not scalar' \
    tests/runtime/kernels/test_attention_kernels.py tests/runtime/kernels/test_page_kernels.py
}
product_tests() {
  echo "arm64: 4-bit products on $1: $(emulated "$1" -c 'from edgekv.runtime._kernels import dense_names; print(dense_names())')"
  emulated "$1" -m pytest -q -p no:cacheprovider --hypothesis-profile=ci tests/runtime/kernels/test_dense.py
}
cd "$tree"
kernel_tests cortex-a72 >"$dir/cortex-a72.txt" 2>&1 &
other=$!
kernel_tests cortex-a76 || { wait "$other" || cat "$dir/cortex-a72.txt"; exit 1; }
wait "$other" || { cat "$dir/cortex-a72.txt"; exit 1; }
cat "$dir/cortex-a72.txt"
for cpu in cortex-a72 cortex-a76 max; do product_tests $cpu; done

# 5. bundles through the shim, which is compiled on first use as on a device: the tokens of this host
cd "$OLDPWD"
if ! "$python" -c "import torchao, executorch" 2>/dev/null; then
  echo "arm64: the ExecuTorch shim was not tested: executorch is not installed here"
  exit 0
fi
for kind in "xnnpack fp32" "edgekv int4"; do
  read -r operators weights <<<"$kind"
  bundle=$dir/$operators.edgekv
  [ -e "$bundle" ] || "$python" -m edgekv export demo --engine executorch --operators "$operators" --weights "$weights" --out "$bundle"
  expected=$("$python" -c "$tokens_code" "$bundle")
  for cpu in cortex-a72 cortex-a76; do
    got=$(cd "$tree" && emulated $cpu -c "$tokens_code" "$bundle")
    [ "$got" = "$expected" ] || { echo "arm64: operators $operators on $cpu give $got, not $expected" >&2; exit 1; }
    echo "arm64: ExecuTorch, operators $operators, weights $weights on $cpu: $got"
  done
done
