"""The main job, start to end: export the bundled model, run it in a phone's memory, show what happened.

`make demo` runs this. The prompt is a long stretch of prose with a secret in it; the question comes at the end, when the
page that holds the answer has long left memory.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "demo-output"
BUNDLE = OUT / "demo.edgekv"
PROFILE = "galaxy-s24-8gb"
BUDGET = "25%"
console = Console(highlight=False)


def edgekv(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would; it prints its own errors."""
    console.print(f"[dim]$ edgekv {' '.join(arguments)}[/dim]")
    result = subprocess.run(
        [sys.executable, "-m", "edgekv", *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if result.returncode:
        sys.exit(result.returncode)
    return result


def size(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:.2f} MiB"


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    prompt = OUT / "prompt.txt"
    prompt.write_text((ROOT / "examples" / "long_prompt.txt").read_text(encoding="utf-8"), encoding="utf-8")

    console.print("[bold]1. Export[/bold] the bundled model: a decoder whose KV cache is paged")
    edgekv("export", "demo", "--out", str(BUNDLE))

    console.print(
        f"\n[bold]2. Run[/bold] it as an app on a phone ({PROFILE}); the cache fits there, so nothing has to move"
    )
    run = ("run", str(BUNDLE), "--prompt-file", str(prompt), "--max-tokens", "48", "--kv", "int8", "--json")
    roomy = json.loads(edgekv(*run, "--profile", PROFILE, "--quiet").stdout)

    console.print(f"\n[bold]3. Run[/bold] it with a quarter of the memory that its fp16 cache needs: {BUDGET}")
    tight = json.loads(edgekv(*run, "--kv-budget", BUDGET).stdout)

    console.print(f"\n[dim]... {prompt.read_text(encoding='utf-8')[-160:]!r}[/dim]")
    console.print(tight["text"].strip() + "\n")
    table = Table(title="What happened")
    table.add_column("")
    table.add_column(PROFILE, justify="right")
    table.add_column(f"budget {BUDGET}", justify="right")
    for label, value in (
        ("prompt tokens/s", lambda run: f"{run['prefill_tokens_per_s']:.0f}"),
        ("generated tokens/s", lambda run: f"{run['decode_tokens_per_s']:.1f}"),
        ("peak RSS of the process", lambda run: size(run["peak_rss_bytes"])),
        ("KV budget", lambda run: size(run["cache"]["budget_bytes"])),
        ("KV in fp16 pages (HOT)", lambda run: size(run["cache"]["bytes_by_tier"]["HOT"])),
        ("KV in INT8 pages (WARM)", lambda run: size(run["cache"]["bytes_by_tier"]["WARM"])),
        ("KV on flash (COLD)", lambda run: size(run["cache"]["bytes_by_tier"]["COLD"])),
        ("pages compressed", lambda run: str(run["pages"]["pages_compressed"])),
        ("pages offloaded", lambda run: str(run["pages"]["pages_offloaded"])),
        ("pages fetched", lambda run: str(run["pages"]["pages_fetched"])),
    ):
        table.add_row(label, value(roomy), value(tight))
    console.print(table)
    if tight["text"] != roomy["text"]:
        console.print("[red]The text differs from the run with enough memory: that is a bug.[/red]")
        sys.exit(1)
    console.print("[green]The text is the same, to the letter.[/green]")


if __name__ == "__main__":
    main()
