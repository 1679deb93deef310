#!/usr/bin/env bash
# Show the memory manager at work. Options are passed on; try --help.
set -euo pipefail
cd "$(dirname "$0")"
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
if ! "$python" -c 'import edgekv' 2>/dev/null; then
  echo "edgekv is not installed here; run: make setup" >&2
  exit 1
fi
exec "$python" examples/memory_manager_example.py "$@"
