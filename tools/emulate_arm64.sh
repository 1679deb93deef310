# shellcheck shell=bash
# A Python for aarch64 under qemu, for the scripts beside this one. They define skip REASON, which says it and ends the script.

install_emulator() { # [COMMAND PACKAGE...]: qemu, and packages where COMMAND is not here
  [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || skip "needs an x86-64 Linux host"
  [ "$(id -u)" = 0 ] || skip "needs root, for qemu and its view of the processor"
  command -v apt-get >/dev/null || skip "needs apt-get"
  unshare -m true 2>/dev/null || skip "needs mount namespaces"
  if ! command -v qemu-aarch64-static >/dev/null || ! command -v "${1:-true}" >/dev/null; then
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -y -qq install --no-install-recommends \
      qemu-user-static "${@:2}" >/dev/null; } || skip "apt-get cannot install qemu ${*:2}"
  fi
}

unpack_python() { # DIR: Python and its headers into DIR/root, from the mirror that this machine uses; sets root, version, digits
  local apt=$1/apt sources mirror suite keyring options package
  root=$1/root
  if [ ! -e "$root/.ready" ]; then
    rm -rf "$root" "$apt"
    mkdir -p "$root" "$apt"/etc/apt/{apt.conf.d,preferences.d} "$apt"/var/lib/{apt/lists/partial,dpkg} \
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
    touch "$root/.ready"
  fi
  version=$(basename "$(ls -d "$root"/usr/include/python3.* | head -1)") # python3.11
  digits=${version#python}
}

fetch_wheels() { # COMMAND...: pip COMMAND, for the Python that was unpacked
  local platforms=() tag
  for tag in 2_34 2_28 2_27 2_17; do platforms+=(--platform "manylinux_${tag}_aarch64"); done
  "$python" -m pip "$1" -q --disable-pip-version-check --only-binary=:all: "${platforms[@]}" --platform manylinux2014_aarch64 \
    --python-version "$digits" --implementation cp --abi "cp${digits/./}" --abi abi3 --abi none "${@:2}"
}

# What the system says of its processor would be the host's: a private mount namespace shows the emulated one.
describe() { # the files that cpuinfo, which ExecuTorch and ONNX Runtime ask, reads
  local folder=$dir/$1/system part=0xd08 features="fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
  [ "$1" = cortex-a72 ] || part=0xd0b features="$features atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
  [ "$1" != max ] || features="$features i8mm bf16"
  mkdir -p "$folder/devices/system/cpu"
  for name in possible present online; do echo 0-1 >"$folder/devices/system/cpu/$name"; done
  for core in 0 1; do
    printf 'processor\t: %d\nFeatures\t: %s\nCPU implementer\t: 0x41\nCPU architecture: 8\n' "$core" "$features"
    printf 'CPU variant\t: 0x0\nCPU part\t: %s\nCPU revision\t: 3\n\n' "$part"
  done >"$dir/$1/cpuinfo"
}
emulated() { # CPU ARGUMENTS...: the Python that was unpacked, with PYTHONPATH=$path and the variables in the array environment
  describe "$1"
  local variables=() variable
  for variable in "PYTHONPATH=$path" "XDG_CACHE_HOME=$dir/cache" PYTHONDONTWRITEBYTECODE=1 "${environment[@]}"; do
    variables+=(-E "$variable")
  done
  # shellcheck disable=SC2016
  unshare -m sh -c 'mount --bind "$0/system" /sys && mount --bind "$0/cpuinfo" /proc/cpuinfo && exec "$@"' "$dir/$1" \
    qemu-aarch64-static -cpu "$1" -L "$root" "${variables[@]}" "$root/usr/bin/$version" "${@:2}"
}

# Eight tokens that a bundle generates.
# shellcheck disable=SC2034
tokens_code="
import sys
from edgekv.runtime.generate import Generator, RunOptions
with Generator.open(sys.argv[1], RunOptions(threads=1)) as generator:
    print(list(generator.tokens([104, 670, 47, 714] * 5, max_tokens=8)))"
