#!/usr/bin/env bash
# Cross-compile the native kernels and the ExecuTorch shim for aarch64 and run their tests under qemu: what a Raspberry Pi
# 4 (no dot products) and 5 (with them) would run. Checks results, not speed. Needs root and apt-get; where something that
# it needs cannot be had, it says so in one line and succeeds.
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
  { fetch numpy xxhash msgspec pytest pytest-timeout hypothesis && fetch --no-deps executorch==1.5.1; } ||
    skip "the package index has no aarch64 wheels of what the tests import"
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
mkdir -p "$dir/objects"
objects=() jobs=()
for source in $(find runtime/native -name "*.cpp" -not -path "*/executorch/*") "$nanobind/src/nb_combined.cpp"; do
  flags=(-fvisibility=hidden -fno-strict-aliasing -DNDEBUG -DNB_COMPACT_ASSERTIONS)
  case $source in *isa/neon_dot.cpp) flags+=(-march=armv8.2-a+dotprod) ;; esac
  object=$dir/objects/${source//\//_}.o
  "${compile[@]}" "${flags[@]}" -Iruntime/native "-I$nanobind/include" "-I$nanobind/ext/robin_map/include" "-I$root/usr/include/$version" \
    "-I$root/usr/include" -c "$source" -o "$object" &
  objects+=("$object") jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job"; done
"${compile[@]}" -shared "${objects[@]}" -o "$tree/runtime/_kernels.abi3.so"

# 4. the tests. What the system says of its processor would be the host's: a private mount namespace shows the emulated one.
describe() { # the files that cpuinfo, which ExecuTorch asks, reads
  local folder=$dir/$1/system part=0xd08 features="fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
  [ "$1" = cortex-a72 ] || part=0xd0b features="$features atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
  mkdir -p "$folder/devices/system/cpu"
  for name in possible present online; do echo 0-1 >"$folder/devices/system/cpu/$name"; done
  for core in 0 1; do
    printf 'processor\t: %d\nFeatures\t: %s\nCPU implementer\t: 0x41\nCPU architecture: 8\n' "$core" "$features"
    printf 'CPU variant\t: 0x0\nCPU part\t: %s\nCPU revision\t: 3\n\n' "$part"
  done >"$dir/$1/cpuinfo"
}
emulated() {
  describe "$1"
  # shellcheck disable=SC2016
  unshare -m sh -c 'mount --bind "$0/system" /sys && mount --bind "$0/cpuinfo" /proc/cpuinfo && exec "$@"' "$dir/$1" \
    qemu-aarch64-static -cpu "$1" -L "$root" -E "PYTHONPATH=$site:$tree" -E "XDG_CACHE_HOME=$dir/cache" \
    -E CXX=aarch64-linux-gnu-g++ -E PYTHONDONTWRITEBYTECODE=1 "$root/usr/bin/$version" "${@:2}"
}
kernel_tests() { # Emulation is slow, so the kernels that are the same everywhere are left to the host's own tests.
  echo "arm64: the kernels on $1: $(emulated "$1" -c 'from edgekv.runtime.kernels.choose import load_kernels; print(load_kernels().isa())')"
  emulated "$1" -m pytest -q -p no:cacheprovider --hypothesis-profile=ci -k 'not numpy and not scalar' \
    tests/runtime/kernels/test_attention_kernels.py tests/runtime/kernels/test_page_kernels.py
}
cd "$tree"
kernel_tests cortex-a72 >"$dir/cortex-a72.txt" 2>&1 &
other=$!
kernel_tests cortex-a76 || { wait "$other" || cat "$dir/cortex-a72.txt"; exit 1; }
wait "$other" || { cat "$dir/cortex-a72.txt"; exit 1; }
cat "$dir/cortex-a72.txt"

# 5. bundles through the shim, which is compiled on first use as on a device: the tokens of this host
cd "$OLDPWD"
if ! "$python" -c "import torchao, executorch" 2>/dev/null; then
  echo "arm64: the ExecuTorch shim was not tested: executorch is not installed here"
  exit 0
fi
code="
import sys
from edgekv.runtime.generate import Generator, RunOptions
with Generator.open(sys.argv[1], RunOptions(threads=1)) as generator:
    print(list(generator.tokens([104, 670, 47, 714] * 5, max_tokens=8)))"
for kind in "xnnpack fp32" "edgekv int4"; do
  read -r operators weights <<<"$kind"
  bundle=$dir/$operators.edgekv
  [ -e "$bundle" ] || "$python" -m edgekv export demo --engine executorch --operators "$operators" --weights "$weights" --out "$bundle"
  expected=$("$python" -c "$code" "$bundle")
  for cpu in cortex-a72 cortex-a76; do
    got=$(cd "$tree" && emulated $cpu -c "$code" "$bundle")
    [ "$got" = "$expected" ] || { echo "arm64: operators $operators on $cpu give $got, not $expected" >&2; exit 1; }
    echo "arm64: ExecuTorch, operators $operators, weights $weights on $cpu: $got"
  done
done
