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
OUT = Path("demo-output")
BUNDLE = OUT / "demo.edgekv"
PROMPT = Path("examples") / "long_prompt.txt"
PROFILE = "galaxy-s24-8gb"
BUDGET = "25%"
console = Console(highlight=False)


def edgekv(*arguments: str) -> str:
    """Run the command line as a user would; pass its output on as it comes, and return it."""
    console.print(f"[dim]$ edgekv {' '.join(arguments)}[/dim]", soft_wrap=True)
    said = []
    with subprocess.Popen([sys.executable, "-m", "edgekv", *arguments], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while chunk := process.stdout.read1():
            said.append(chunk)
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
    if process.returncode:
        sys.exit(process.returncode)
    return b"".join(said).decode()


def size(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:.2f} MiB"


def main() -> None:
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    (ROOT / OUT).mkdir()

    console.print("[bold]1. Export[/bold] the bundled model: a decoder whose KV cache is paged")
    edgekv("export", "demo", "--out", str(BUNDLE))

    prompt = (ROOT / PROMPT).read_text(encoding="utf-8")
    console.print(
        f"\n[bold]2. The prompt[/bold]: {len(prompt)} characters of prose with two secrets in it, and at the end:"
    )
    console.print(prompt[prompt.rindex("Question") :], style="cyan")

    console.print(f"\n[bold]3. Run[/bold] it as an app on a phone ({PROFILE}): the cache fits, so nothing has to move")
    run = ("run", str(BUNDLE), "--prompt-file", str(PROMPT), "--max-tokens", "48", "--kv", "int8", "--quiet")
    roomy_text = edgekv(*run, "--profile", PROFILE, "--stats", str(OUT / "roomy.json"))

    console.print(f"\n[bold]4. Run[/bold] it with a quarter of the memory that its fp16 cache needs ({BUDGET})")
    tight_text = edgekv(*run, "--kv-budget", BUDGET, "--stats", str(OUT / "tight.json"))

    roomy, tight = (
        json.loads((ROOT / OUT / name).read_text(encoding="utf-8")) for name in ("roomy.json", "tight.json")
    )
    console.print()
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
    if tight_text != roomy_text:
        console.print("[red]The text differs from the run with enough memory: that is a bug.[/red]")
        sys.exit(1)
    console.print("[green]The text is the same, to the letter.[/green]")


if __name__ == "__main__":
    main()
