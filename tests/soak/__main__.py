"""The command: rounds until the time is over, a line a minute, a summary in JSON; exit code 1 when something grew or differed."""

from __future__ import annotations

import argparse
import atexit
import collections
import faulthandler
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

FORMS = ("split", "inline")
#: A round that lasts longer has hung: the stacks of all threads are printed, and that is the end.
HUNG_S = 600


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None, help="of all rounds; another one each time")
    parser.add_argument("--round", type=int, default=None, help="only this one, as it was under this seed")
    parser.add_argument("--kind", help="only rounds of this kind")
    parser.add_argument(
        "--bundles", type=Path, default=Path("bench-output/soak"), help="where bundles are, or are exported to"
    )
    return parser.parse_args()


def exported(folder: Path) -> dict[str, Path]:
    """Return a bundle for each engine that is installed and each form, exported unless it is there."""
    found = {}
    for engine in ("onnx", "executorch"):
        for form in FORMS:
            path = folder / f"{engine}-{form}.edgekv"
            if not path.exists():
                command = [
                    "export",
                    "demo",
                    "--out",
                    str(path),
                    "--engine",
                    engine,
                    "--form",
                    form,
                    "--weights",
                    "fp32",
                ]
                result = subprocess.run(
                    [sys.executable, "-m", "edgekv", *command], capture_output=True, text=True, check=False
                )
                if engine == "executorch" and result.returncode == 2:
                    print(f"without {engine}: {result.stderr.strip()}", flush=True)
                    break
                assert result.returncode == 0, result.stderr
            found[f"{engine}-{form}"] = path
    return found


def main() -> int:
    asked = arguments()
    seed = asked.seed if asked.seed is not None else random.SystemRandom().randrange(10**6)
    home = Path(tempfile.mkdtemp(prefix="edgekv-soak-"))
    good: list[bool] = []
    # Registered first, so that it comes last, after what others want to remove from there.
    atexit.register(lambda: shutil.rmtree(home, ignore_errors=True) if good else None)
    cache, temporary = home / "cache", home / "tmp"
    for folder in (cache, temporary, home / "work"):
        folder.mkdir()
    bundles = exported(asked.bundles.resolve())
    # Before anything of edgekv is loaded here, and before the server starts that forks the others.
    os.environ.update(XDG_CACHE_HOME=str(cache), XDG_CONFIG_HOME=str(home / "config"), TMPDIR=str(temporary))
    tempfile.tempdir = None
    signal.signal(signal.SIGINT, signal.default_int_handler)

    from .gauge import Gauge
    from .rounds import KINDS, World

    world = World(home / "work", bundles)
    gauge = Gauge([cache, temporary])
    print(f"seed {seed}, {asked.minutes:g} minutes, {', '.join(bundles)}, in {home}", flush=True)
    counts: collections.Counter[str] = collections.Counter()
    failures: list[dict[str, object]] = []
    began = said = time.monotonic()
    number = asked.round if asked.round is not None else 0
    names = [name for name, kind in KINDS.items() for _ in range(kind.weight)]
    while time.monotonic() - began < asked.minutes * 60:
        chance = random.Random(f"{seed}/{number}")
        name = chance.choice(names)
        if asked.kind is None or name == asked.kind:
            faulthandler.dump_traceback_later(HUNG_S, exit=True)
            try:
                world.begin(chance)
                KINDS[name].play(world, chance)
                world.end()
            except Exception as error:
                failures.append({"round": number, "kind": name, "error": f"{type(error).__name__}: {error}"[:1000]})
                print(f"round {number} ({name}) FAILED; replay it with --seed {seed} --round {number}", flush=True)
                print("\n".join(world.story), flush=True)
                traceback.print_exc(file=sys.stdout)
                sys.stdout.flush()
                error.__traceback__ = None
                world.give_up()
            faulthandler.cancel_dump_traceback_later()
            counts[name] += 1
            gc.collect()
            reading = gauge.read(time.monotonic() - began)
            if time.monotonic() - said >= 60:
                said += 60
                print(
                    f"{reading.seconds / 60:5.1f} min  {counts.total()} rounds, {len(failures)} failed  "
                    f"RSS {reading.rss_bytes / 2**20:.1f} MiB  {reading.threads} threads  "
                    f"{reading.descriptors} descriptors  {len(reading.files)} files",
                    flush=True,
                )
        if asked.round is not None:
            break
        number += 1
    grown = [] if asked.round is not None else gauge.grown()
    world.close()
    print(
        json.dumps(
            {
                "seed": seed,
                "minutes": round((time.monotonic() - began) / 60, 1),
                "bundles": list(bundles),
                "rounds": dict(sorted(counts.items())),
                "events": dict(sorted(world.events.items())),
                "thirds": gauge.thirds() if len(gauge.readings) >= 6 else [],
                "failures": failures,
                "grown": grown,
            },
            indent=1,
        ),
        flush=True,
    )
    if not failures and not grown:
        good.append(True)
        return 0
    print(f"what it left is in {home}", flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
