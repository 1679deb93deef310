"""The main job, start to end: export the bundled model, run it in a phone's memory, show what happened.

`make demo` runs this. The prompt is a long stretch of prose with a secret in it; the question comes at the end, when the
page that holds the answer has long left memory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from edgekv.bundle import read_manifest

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


def in_ram(run: dict[str, Any]) -> int:
    """Return the bytes of keys and values that a run held in memory at its end."""
    tiers = run["cache"]["bytes_by_tier"]
    return int(tiers["HOT"] + tiers["WARM"])


def say(text: str) -> None:
    console.print(text, soft_wrap=True)


def main() -> None:
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    (ROOT / OUT).mkdir()

    say("[bold]1. Export[/bold] the bundled model: a decoder whose KV cache is paged")
    edgekv("export", "demo", "--out", str(BUNDLE))

    prompt = (ROOT / PROMPT).read_text(encoding="utf-8")
    console.print(
        f"\n[bold]2. The prompt[/bold]: {len(prompt)} characters of prose with two secrets in it, and at the end:"
    )
    console.print(prompt[prompt.rindex("Question") :], style="cyan")

    say(f"\n[bold]3. Run[/bold] it as an app on a phone ({PROFILE}): the cache fits, so nothing has to move")
    run = ("run", str(BUNDLE), "--prompt-file", str(PROMPT), "--max-tokens", "48", "--kv", "int8", "--quiet")
    roomy_text = edgekv(*run, "--profile", PROFILE, "--stats", str(OUT / "roomy.json"))

    say(f"\n[bold]4. Run[/bold] it with a quarter of the memory that its fp16 cache needs ({BUDGET})")
    tight_text = edgekv(*run, "--kv-budget", BUDGET, "--stats", str(OUT / "tight.json"))

    roomy, tight = (
        json.loads((ROOT / OUT / name).read_text(encoding="utf-8")) for name in ("roomy.json", "tight.json")
    )
    tokens, manifest = tight["cache"]["tokens"], read_manifest(ROOT / BUNDLE)
    whole = manifest.model.pages(manifest.page_size).fp16_cache_bytes(tokens)
    console.print()
    table = Table(title=f"Keys and values of {tokens} tokens, {size(whole)} in fp16")
    table.add_column("")
    table.add_column(PROFILE, justify="right")
    table.add_column(f"budget {BUDGET}", justify="right")
    for label, value in (
        ("in RAM", lambda run: size(in_ram(run))),
        ("on flash", lambda run: size(run["cache"]["bytes_by_tier"]["COLD"])),
        ("RAM saved, against fp16", lambda run: f"{1 - in_ram(run) / whole:.0%}"),
        ("pages compressed to INT8", lambda run: str(run["pages"]["pages_compressed"])),
        ("pages written to flash", lambda run: str(run["pages"]["pages_offloaded"])),
        ("pages read back", lambda run: str(run["pages"]["pages_fetched"])),
        ("prompt tokens/s", lambda run: f"{run['prefill_tokens_per_s']:.0f}"),
        ("generated tokens/s", lambda run: f"{run['decode_tokens_per_s']:.1f}"),
    ):
        table.add_row(label, value(roomy), value(tight))
    console.print(table)
    rest = (tight["peak_rss_bytes"] - in_ram(tight)) / 2**20
    say(
        f"The rest of the process, {rest:.0f} MiB, is interpreter, libraries and weights. What grows with the text is above: this"
        f" model keeps {whole / tokens / 1024:.0f} KiB per token in fp16, Llama 3.2 3B 112."
    )
    if tight_text != roomy_text:
        console.print("[red]The text differs from the run with enough memory: that is a bug.[/red]")
        sys.exit(1)
    say("[green]The text is the same, to the letter.[/green]")
    say(
        "\n[bold]Next[/bold], in this shell:\n"
        + ("" if shutil.which("edgekv") else f"  source {os.path.relpath(Path(sys.executable).parent / 'activate')}\n")
        + f"  edgekv run {BUNDLE} --chat --kv-budget {BUDGET}      talk to it\n"
        f"  edgekv plan ./Llama-3.2-1B --all-profiles --context 8192      what fits which device, from a Hugging Face folder\n"
        f"  edgekv export ./Llama-3.2-1B --out llama.edgekv      your model"
    )


if __name__ == "__main__":
    main()
