#!/usr/bin/env bash
# Compile the native kernels with sanitizers and run their tests under them: AddressSanitizer and UBSan over everything that is
# native, runs that are left early a hundred times, then ThreadSanitizer over the pool and the readers. Needs GCC on Linux;
# where it cannot be, it says so in one line and succeeds.
# Usage: tools/sanitize.sh [address|thread]...    (default: both)
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
[ -x "$python" ] || python=$(command -v python3)
bin=$(dirname "$(readlink -f "$python")")

skip() { echo "sanitize: skipped: $1"; exit 0; }
[ "$(uname -s)" = Linux ] || skip "needs Linux"
command -v g++ >/dev/null || skip "needs GCC"
for library in libasan libubsan libtsan; do
  [ -e "$(gcc -print-file-name=$library.so)" ] || skip "this GCC has no $library"
done

build() { # name, sanitizers: the kernels, which EDGEKV_SANITIZED names from then on
  local dir=$PWD/build/sanitize/$1
  PATH=$PWD/.venv/bin:$bin:$PATH cmake -S runtime/native -B "$dir" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DEDGEKV_SANITIZE="$2" \
    -DPython_EXECUTABLE="$python" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$dir" -DCMAKE_CXX_COMPILER=g++ >/dev/null
  cmake --build "$dir" --parallel >"$dir/log" 2>&1 || { cat "$dir/log"; exit 1; }
  EDGEKV_SANITIZED=$(ls "$dir"/_kernels*.so)
  export EDGEKV_SANITIZED PYTHONPATH=$PWD/tools/sanitized
}

under() { # libraries, command: a process into which these are loaded first
  local libraries=""
  for library in $1; do libraries+=$(gcc -print-file-name="$library.so"):; done
  # Where the system spreads addresses far, ThreadSanitizer finds no room for its shadow.
  LD_PRELOAD=$libraries$(gcc -print-file-name=libstdc++.so.6) setarch -R "${@:2}"
}

pytest=("$python" -m pytest -q -x -p no:cacheprovider -m "not exhaustive")
for which in "${@:-address thread}"; do
  for name in $which; do
    case $name in
    address)
      echo "sanitize: AddressSanitizer and UBSan"
      build address address,undefined
      export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc
      # What test_operators.py runs is compiled by the exporter and ExecuTorch, without sanitizers.
      under "libasan libubsan" "${pytest[@]}" tests/runtime/kernels --ignore=tests/runtime/kernels/test_operators.py \
        tests/runtime/storage/test_ring.py tests/runtime/test_left_early.py
      ;;
    thread)
      echo "sanitize: ThreadSanitizer"
      build thread thread
      export TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1
      # What ONNX Runtime's own threads hand to each other cannot be seen: it is compiled without.
      under libtsan "${pytest[@]}" -k "not onnx_runtime" tests/runtime/kernels/test_pool.py \
        tests/runtime/kernels/test_record_reader.py tests/runtime/storage/test_ring.py
      ;;
    *) echo "sanitize: address or thread, not $name" >&2; exit 2 ;;
    esac
  done
done
