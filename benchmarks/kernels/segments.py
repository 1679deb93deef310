"""The dense part of a split bundle, without attention: time per block of rows, start, memory.

    python -m benchmarks.kernels.segments BUNDLE [--threads 2] [--rows 1,16,128] [--seconds 4]

Works for bundles of either engine. One JSON line per number of rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from benchmarks.speed import timing
from edgekv.bundle import read_manifest
from edgekv.runtime.engines.choose import open_segments
from edgekv.runtime.generate import cache_home


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", default="1,16,128")
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    manifest = read_manifest(options.bundle)
    started = time.perf_counter()
    engine = open_segments(options.bundle, manifest, options.threads, cache_home(), own_process=True)
    n_layers = manifest.model.n_layers
    for rows in [int(text) for text in options.rows.split(",")]:
        buffers = engine.prepare(rows)
        times = []
        begin = time.perf_counter()
        while time.perf_counter() - begin < options.seconds or len(times) < 5:
            at = time.perf_counter()
            for index in range(n_layers):
                engine.run(index, buffers)
            engine.head(buffers.residual[(n_layers - 1) % 2][-1:], buffers.attention[-1:])
            times.append(time.perf_counter() - at)
            if len(times) == 1:
                first = time.perf_counter() - started
        median = statistics.median(times[1:])
        result = {
            "engine": engine.description,
            "weights": manifest.weights,
            "rows": rows,
            "seconds": median,
            "best_seconds": min(times),
            "tokens_per_s": rows / median,
            "first_step_s": first,
            **{name: timing.memory_mb(name) for name in ("VmRSS", "RssAnon", "RssFile", "VmHWM")},  # in MB of 2**20
        }
        print(
            json.dumps({key: round(value, 6) if isinstance(value, float) else value for key, value in result.items()})
        )


if __name__ == "__main__":
    main()
