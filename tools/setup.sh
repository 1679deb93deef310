#!/usr/bin/env bash
# Make a virtual environment with everything that the Makefile's targets need. Safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3.11 python3.12 python3.13 python3.10 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
fi
[ -n "$python" ] || { echo "edgekv needs Python 3.10 or newer, with venv" >&2; exit 1; }

[ -x "$venv/bin/python" ] || { echo "creating $venv with $("$python" --version)"; "$python" -m venv "$venv"; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
echo "installing PyTorch (the largest part; a few minutes the first time)"
pip install "torch==2.13.0"
echo "installing edgekv and its tools"
pip install -e ".[dev]"
# A test watches system calls; without strace it is skipped.
if ! command -v strace >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  { apt-get update && apt-get install --yes --no-install-recommends strace; } >/dev/null 2>&1 || echo "strace could not be installed" >&2
fi
echo "ready: $venv/bin/edgekv"
