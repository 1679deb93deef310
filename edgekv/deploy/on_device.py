"""What the device does for `edgekv deploy`: sent to its python3 on stdin, so it imports nothing but the standard library.

``python3 - QUESTION JSON`` prints the answer as JSON. An error that is expected is one line on stderr, and exit code 1.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import zipfile
from typing import Any

#: What a file is called until it is whole.
PART = ".part"


def sha256(path: str) -> str:
    """Hash a file without holding it in memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_whole(path: str, size: int, digest: str) -> bool:
    """Say whether a file is there with these bytes."""
    return os.path.isfile(path) and os.path.getsize(path) == size and sha256(path) == digest


def missing(folders: list[str], items: list[list[Any]]) -> list[Any]:
    """Say of each ``[name, size, sha256, instead]`` the folder that has it whole, or ``[size, sha256]`` of its part.

    Changes nothing. ``instead``: a folder that makes the file needless, or None.

    Args:
        folders: where it may lie; the first one is where its part would.
    """
    found: list[Any] = []
    for name, size, digest, instead in items:
        if instead is not None and os.path.isdir(instead):
            found.append(instead)
            continue
        there = [folder for folder in folders if is_whole(os.path.join(folder, name), size, digest)]
        found.append(there[0] if there else begun(os.path.join(folders[0], name)))
    return found


def begun(path: str) -> list[Any]:
    """Return ``[size, sha256]`` of the part of a file, which has no bytes where there is none."""
    part = path + PART
    if os.path.isfile(part):
        return [os.path.getsize(part), sha256(part)]
    return [0, hashlib.sha256().hexdigest()]


def prepare(folder: str, names: list[str], older: list[list[str]], drop: list[str]) -> None:
    """Make a folder for files, and those below it; take over files that an older folder has; forget parts that are no beginnings.

    Args:
        names: of files that come.
        older: ``[name, folder]`` of those that are there.
        drop: names whose part is no beginning of the file.
    """
    for name in ["x", *names]:
        os.makedirs(os.path.dirname(os.path.join(folder, name)), mode=0o755, exist_ok=True)
    for name, place in older:
        target = os.path.join(folder, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.lexists(target):
            os.remove(target)
        try:
            os.link(os.path.join(place, name), target)
        except OSError:  # a file system without links
            shutil.copyfile(os.path.join(place, name), target)
    for name in drop:
        os.remove(os.path.join(folder, name + PART))


def finish(path: str, size: int, digest: str) -> bool:
    """Give a part its name when it is whole, and say whether it was; one that is too long or wrong is removed."""
    part = path + PART
    there = os.path.getsize(part) if os.path.isfile(part) else 0
    if there < size:
        return False  # it goes on later
    if not is_whole(part, size, digest):
        os.remove(part)
        return False
    with open(part, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(part, path)
    return True


def place(folder: str, target: str, names: list[str]) -> None:
    """Put a folder with just these files where an older one is: under its name there is always a whole one, or none."""
    for root, _, files in os.walk(folder):
        for file in files:
            if os.path.relpath(os.path.join(root, file), folder) not in names:
                os.remove(os.path.join(root, file))
    older = folder + ".older"
    shutil.rmtree(older, ignore_errors=True)
    if os.path.isdir(target):
        os.rename(target, older)
    os.rename(folder, target)
    shutil.rmtree(older, ignore_errors=True)


def unpack(wheels: list[list[str]]) -> None:
    """Unpack wheels, each ``[file, folder]``, and remove the files: a folder is there whole or not at all."""
    for file, folder in wheels:
        if not os.path.isdir(folder):
            beside = folder + PART
            shutil.rmtree(beside, ignore_errors=True)
            with zipfile.ZipFile(file) as wheel:
                wheel.extractall(beside)
            for name in os.listdir(beside):
                for kind in ("purelib", "platlib"):  # what a wheel installs where modules lie
                    inner = os.path.join(beside, name, kind)
                    if name.endswith(".data") and os.path.isdir(inner):
                        shutil.copytree(inner, beside, dirs_exist_ok=True)
            os.rename(beside, folder)
        if os.path.exists(file):
            os.remove(file)


def write(path: str, text: str, mode: int) -> None:
    """Write a small file, whole or not at all."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + PART, "w", encoding="utf-8") as stream:
        stream.write(text)
    os.chmod(path + PART, mode)
    os.replace(path + PART, path)


if __name__ == "__main__":
    try:
        print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
    except OSError as error:
        sys.exit(f"{error.strerror}: {error.filename}")
