#!/usr/bin/env bash
# Cross-compile the native kernels and the ExecuTorch shim for aarch64 and run their tests under qemu: what a Raspberry Pi
# 4 (no dot products) and 5 (with them) would run. Checks results, not speed. Needs root, apt-get and a few minutes.
# Usage: tools/arm64.sh [DIR]    (DIR keeps the environment; default build/arm64)
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$(realpath -m "${1:-build/arm64}")
python=.venv/bin/python
[ -x "$python" ] || python=python3

skip() { echo "arm64: skipped: $1"; exit 0; }
[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || skip "needs an x86-64 Linux host"
[ "$(id -u)" = 0 ] || skip "needs root, to install a cross compiler and qemu"
command -v apt-get >/dev/null || skip "needs apt-get"
unshare -m true 2>/dev/null || skip "needs mount namespaces"

# 1. compiler and emulator
if ! command -v qemu-aarch64-static >/dev/null || ! command -v aarch64-linux-gnu-g++ >/dev/null; then
  echo "arm64: installing qemu and the cross compiler"
  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -y -qq install --no-install-recommends \
    qemu-user-static gcc-aarch64-linux-gnu g++-aarch64-linux-gnu >/dev/null; } || skip "apt-get cannot install them"
fi

# 2. an arm64 Python with what the tests import, unpacked beside the host's own
root=$dir/root site=$dir/site
if [ ! -e "$dir/.ready" ]; then
  echo "arm64: unpacking Python for aarch64 into $dir"
  rm -rf "$dir"
  apt=$dir/apt
  mkdir -p "$root" "$site" "$dir/wheels" "$apt"/etc/apt/{apt.conf.d,preferences.d} "$apt"/var/lib/{apt/lists/partial,dpkg} \
    "$apt/var/cache/apt/archives/partial"
  : >"$apt/var/lib/dpkg/status"
  # the mirror and the suite that this machine already uses
  sources=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.{list,sources} 2>/dev/null || true)
  mirror=$(sed -n 's/^URIs: *\([^ ]*\).*/\1/p; s/^deb \(\[[^]]*\] \)\?\([^ ]*\).*/\2/p' <<<"$sources" | head -1)
  # shellcheck disable=SC1091
  suite=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
  [ -n "$mirror" ] && [ -n "$suite" ] || skip "this system's package mirror is not known"
  keyring=/usr/share/keyrings/$(. /etc/os-release && echo "$ID")-archive-keyring.gpg
  echo "deb [signed-by=$keyring] $mirror $suite main" >"$apt/etc/apt/sources.list"
  options=(-o "Dir=$apt" -o "Dir::State::status=$apt/var/lib/dpkg/status" -o APT::Architecture=arm64
    -o APT::Architectures::=arm64 -o "Dir::Etc::parts=$apt/etc/apt/apt.conf.d" -o APT::Sandbox::User=root)
  { apt-get "${options[@]}" -qq update && apt-get "${options[@]}" -y -qq --no-install-recommends -d install \
    python3 libpython3-dev libstdc++6 libgomp1 zlib1g >/dev/null; } || skip "the mirror has no arm64 packages"
  for package in "$apt"/var/cache/apt/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
fi
version=$(basename "$(ls -d "$root"/usr/include/python3.* | head -1)") # python3.11
if [ ! -e "$dir/.ready" ]; then
  digits=${version#python}
  platforms=()
  for tag in 2_34 2_28 2_27 2_17; do platforms+=(--platform "manylinux_${tag}_aarch64"); done
  fetch() {
    "$python" -m pip download -q --disable-pip-version-check -d "$dir/wheels" --only-binary=:all: "${platforms[@]}" \
      --platform manylinux2014_aarch64 --python-version "$digits" --implementation cp --abi "cp${digits/./}" --abi abi3 --abi none "$@"
  }
  fetch numpy xxhash pytest pytest-timeout hypothesis
  fetch --no-deps executorch==1.5.1
  "$python" - "$dir" <<'PY'
import sys, zipfile
from pathlib import Path

for wheel in Path(sys.argv[1], "wheels").glob("*.whl"):
    zipfile.ZipFile(wheel).extractall(Path(sys.argv[1], "site"))
PY
  touch "$dir/.ready"
fi

# 3. the kernels, into a copy of the tree
echo "arm64: compiling the kernels"
tree=$dir/tree
rm -rf "$tree" && mkdir -p "$tree"
cp -r edgekv export runtime device_profiles tests pyproject.toml "$tree"
rm -f "$tree"/runtime/_kernels*.so "$tree"/tests/conftest.py
nanobind=$("$python" -c 'import nanobind, pathlib; print(pathlib.Path(nanobind.__file__).parent)')
compile=(aarch64-linux-gnu-g++ -std=c++17 -O2 -fPIC)
objects=()
mkdir -p "$dir/objects"
for source in runtime/csrc/*.cpp "$nanobind/src/nb_combined.cpp"; do
  flags=(-fvisibility=hidden -fno-strict-aliasing -DNDEBUG -DNB_COMPACT_ASSERTIONS)
  case $source in *isa_neon_dot.cpp) flags+=(-march=armv8.2-a+dotprod) ;; esac
  object=$dir/objects/$(basename "$source").o
  "${compile[@]}" "${flags[@]}" "-I$nanobind/include" "-I$nanobind/ext/robin_map/include" "-I$root/usr/include/$version" \
    "-I$root/usr/include" -c "$source" -o "$object"
  objects+=("$object")
done
"${compile[@]}" -shared "${objects[@]}" -o "$tree/runtime/_kernels.abi3.so"

# 4. the tests. A private mount namespace hides the host's /sys, whose CPU lists confuse what runs under qemu.
emulated() {
  unshare -m sh -c 'mount -t tmpfs none /sys && exec "$@"' sh qemu-aarch64-static -cpu "$1" -L "$root" \
    -E "PYTHONPATH=$site:$tree" -E "XDG_CACHE_HOME=$dir/cache" -E CXX=aarch64-linux-gnu-g++ -E PYTHONDONTWRITEBYTECODE=1 \
    "$root/usr/bin/$version" "${@:2}"
}
cd "$tree"
for cpu in cortex-a72 cortex-a76; do
  echo "arm64: the kernels on $cpu: $(emulated $cpu -c 'from edgekv.runtime.kernels import load_kernels; print(load_kernels().isa())')"
  emulated $cpu -m pytest -q -p no:cacheprovider tests/runtime/test_kernels_attention.py tests/runtime/test_kernels_pages.py
done

# 5. a bundle through the shim, which is compiled on first use as on a device: the tokens of this host
cd "$OLDPWD"
bundle=$dir/demo.edgekv
if ! "$python" -c "import torchao, executorch" 2>/dev/null; then
  echo "arm64: the ExecuTorch shim was not tested: executorch is not installed here"
  exit 0
fi
[ -e "$bundle" ] || "$python" -m edgekv export demo --engine executorch --out "$bundle"
code="
import sys
from edgekv.runtime.generate import Generator, RunOptions
with Generator.open(sys.argv[1], RunOptions(threads=1)) as generator:
    print(generator.engine, list(generator.tokens([104, 670, 47, 714] * 5, max_tokens=8)))"
expected=$("$python" -c "$code" "$bundle")
for cpu in cortex-a72 cortex-a76; do
  got=$(cd "$tree" && emulated $cpu -c "$code" "$bundle")
  [ "$got" = "$expected" ] || { echo "arm64: ExecuTorch on $cpu gives $got, not $expected" >&2; exit 1; }
  echo "arm64: ExecuTorch on $cpu: $got"
done
