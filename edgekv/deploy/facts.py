"""What a device says of itself."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import Any

from edgekv.errors import EdgeKVError
from edgekv.host import class_of

from .device import Device

#: What a device is asked, in any POSIX shell. ``df`` is asked of the nearest folder that is there.
_QUESTIONS = """
cd || exit 1
d=DEST
case $d in /*) ;; *) d=$(pwd)/$d ;; esac
echo "folder=$d"
while [ ! -d "$d" ]; do d=$(dirname "$d"); done
df -Pk "$d" | tail -n 1 | sed 's/^/df=/'
echo "machine=$(uname -m)"
echo "system=$(uname -s)"
echo "node=$(uname -n)"
sed -n 's/^MemTotal: *\\([0-9]*\\) kB/total_kb=\\1/p; s/^MemAvailable: *\\([0-9]*\\) kB/available_kb=\\1/p' /proc/meminfo
sed -n 's/^\\(flags\\|Features\\)[^:]*:/features=/p' /proc/cpuinfo | head -n 1
[ -e /system/bin/linker64 ] && echo libc=bionic
for l in /lib/ld-musl-*; do [ -e "$l" ] && echo libc=musl; done
for c in c++ g++ clang++; do command -v $c >/dev/null 2>&1 && echo compiler=$c; done
systemctl --user show-environment >/dev/null 2>&1 && echo services=yes
p=$(command -v python3) && echo "python_path=$p" && python3 -c 'PYTHON' | sed 's/^/python=/'
exit 0
"""
_PYTHON = """
import ctypes, hashlib, json, os, struct, sys, zipfile, zlib
try:
    libc = os.confstr("CS_GNU_LIBC_VERSION")
except (ValueError, OSError):
    libc = None
bits, flags = struct.calcsize("P") * 8, getattr(sys, "abiflags", "")
print(json.dumps([list(sys.version_info[:2]), sys.implementation.name, bits, libc, flags]))
"""


@dataclass(frozen=True)
class Python:
    """The device's own Python; ``bits``: of its addresses, which a 64-bit system need not share."""

    path: str
    version: tuple[int, int]
    implementation: str
    bits: int
    abi_flags: str

    def __str__(self) -> str:
        """Print its version."""
        return ".".join(map(str, self.version))


@dataclass(frozen=True)
class DeviceFacts:
    """What a device is. ``glibc``: its version, None where the C library is another one, which ``libc`` names then."""

    node: str
    system: str
    machine: str
    machine_class: str
    libc: str
    glibc: tuple[int, int] | None
    ram_bytes: int
    available_bytes: int
    free_flash_bytes: int
    folder: str
    python: Python | None
    compiler: bool
    services: bool

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "name": self.node, "system": self.system, "machine": self.machine, "machine_class": self.machine_class,
            "libc": self.libc, "ram_bytes": self.ram_bytes, "available_bytes": self.available_bytes,
            "free_flash_bytes": self.free_flash_bytes, "folder": self.folder,
            "python": str(self.python) if self.python else None,
        }  # fmt: skip


def ask_device(device: Device, folder: str) -> DeviceFacts:
    """Ask a device what it is.

    Args:
        folder: where the bundle is to go; a relative one is below the user's home there.

    Raises:
        EdgeKVError: it gives no sense.
    """
    question = _QUESTIONS.replace("DEST", shlex.quote(folder)).replace("PYTHON", _PYTHON)
    found = device.run("sh -s", question.encode())
    said: dict[str, str] = {}
    for line in found.stdout.decode(errors="replace").splitlines():
        key, _, value = line.rstrip("\r").partition("=")
        said.setdefault(key, value.strip())
    try:
        return _read(said)
    except (KeyError, ValueError, IndexError) as error:
        raise EdgeKVError(
            f"{device.name} does not say what it is ({found.said or f'no {error}'}); it must have a POSIX sh with uname, df, sed"
        ) from error


def _read(said: dict[str, str]) -> DeviceFacts:
    python, glibc = None, None
    if said.get("python"):
        version, implementation, bits, libc, flags = json.loads(said["python"])
        python = Python(said["python_path"], (version[0], version[1]), implementation, bits, flags)
        number = re.fullmatch(r"glibc (\d+)\.(\d+).*", libc or "")
        glibc = (int(number[1]), int(number[2])) if number else None
    return DeviceFacts(
        node=said["node"],
        system=said["system"],
        machine=said["machine"],
        machine_class=class_of(said["machine"], set(said.get("features", "").split())),
        libc="glibc {}.{}".format(*glibc) if glibc else said.get("libc", "unknown"),
        glibc=glibc,
        ram_bytes=int(said["total_kb"]) << 10,
        available_bytes=int(said.get("available_kb", said["total_kb"])) << 10,
        free_flash_bytes=int(re.findall(r"\s(\d+)", said["df"])[2]) << 10,
        folder=said["folder"].rstrip("/"),
        python=python,
        compiler="compiler" in said,
        services="services" in said,
    )
