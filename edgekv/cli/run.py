"""`edgekv run`: generate text from a bundle inside a memory budget."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from edgekv import settings
from edgekv.bundle import read_manifest
from edgekv.errors import EdgeKVError, UsageError
from edgekv.host import machine_class
from edgekv.sizes import format_bytes
from edgekv.tiers import KVMode, PressureMode

from .chat import Manner, converse, remembered, retell
from .files import check_writable, read_text, write_text
from .interrupt import Interrupted, Signals
from .options import argument, option
from .output import Facts, print_json_line, stderr
from .sampling import Sampling, chosen
from .sessions import continued, session_facts, session_line, session_options

if TYPE_CHECKING:
    from edgekv.runtime.generate import Generator

#: Called with (tokens done, tokens to do).
Progressed = Callable[[int, int], None]


#: Tokens that a conversation may grow to when --context does not say.
CHAT_CONTEXT = 8192

EPILOG = """
Examples:

`edgekv run demo.edgekv --prompt "It was a dark night"`

`edgekv run llama.edgekv --prompt "Why is the sky blue?"` asks a chat model; with `--raw` it only goes on with the text

`edgekv run llama.edgekv --profile raspberry-pi-5-8gb --chat`

`edgekv run llama.edgekv --kv-budget 64MiB --context 16384 --prompt-file book.txt --raw --max-tokens 200`

`edgekv run llama.edgekv --kv-budget 25% --prompt "..." --json | jq .decode_tokens_per_s`

`edgekv run llama.edgekv --kv-budget 64MiB --offload s3://bucket/kv --flash-limit 2GiB --prompt-file book.txt`

`edgekv run llama.edgekv --session chat.kv --chat` remembers the conversation; run it again to go on

`edgekv run llama.edgekv --session story.kv --continue --max-tokens 500`
"""


def run_command(
    command: typer.Context,
    bundle: Annotated[Path, argument(settings.BUNDLE, "BUNDLE", help="A folder made by `edgekv export`.")],
    prompt: Annotated[str | None, option(settings.PROMPT, "--prompt", "-p", help="The prompt; to a chat model, a message.")] = None,
    prompt_file: Annotated[Path | None, option(settings.FILE, "--prompt-file", "-f", help="Read the prompt from a file; - is stdin.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Give a chat model the prompt as it is, without its chat template.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Hold a conversation with who types; through a pipe, one line per turn.")] = False,
    system: Annotated[str | None, option(settings.SYSTEM, "--system", help="System message of the conversation, or before the prompt.")] = None,
    profile: Annotated[str | None, option(settings.PROFILE, "--profile", help="Device whose memory sets the KV budget; see `edgekv profiles`.")] = None,
    kv_budget: Annotated[str | None, option(settings.KV_BUDGET, "--kv-budget", help="RAM for keys and values: 64MiB, or 25% of the fp16 cache of the context.")] = None,
    context: Annotated[int | None, option(settings.CONTEXT, "--context", help="Tokens in the sequence at the most. Default: what the prompt and --max-tokens need; 8192 with --chat.")] = None,
    max_tokens: Annotated[int, option(settings.MAX_TOKENS, "--max-tokens", "-n", help="Tokens to generate at the most.")] = 256,
    kv: Annotated[KVMode, option(settings.KV, "--kv", help="auto: fp16 while the context fits the budget, INT8 otherwise. int8: from the first full page. fp16: until memory runs out.")] = KVMode.AUTO,
    policy: Annotated[str, option(settings.POLICY, "--policy", help="Which pages leave RAM first: lru, heavy, window, random.")] = "lru",
    attend: Annotated[str, option(settings.ATTEND, "--attend", help="selective: each new token attends to the pages that matter most, N per layer, a share (25%), as many as prove that less than EPSILON of the attention is missed, or as many as stay in RAM. Changes results, and bounds by how much.")] = "exact",
    pin_prompt: Annotated[bool, typer.Option("--pin-prompt", help="Pin the pages of the prompt (with --chat: of the system message): they leave RAM last, are never dropped, and selective attention always takes them.")] = False,
    offload: Annotated[str | None, option(settings.OFFLOAD, "--offload", help="Where pages go that do not fit: a folder, or an object store like s3://bucket/prefix, gs://, az:// or file:// (pip install 'edgekv[cloud]'; credentials from the environment). Default: a private file in the user's cache folder.")] = None,
    flash_limit: Annotated[int | None, option(settings.FLASH_LIMIT, "--flash-limit", help="With --offload URL: keep so much on flash, and only the rest in the object store. Default: nothing.")] = None,
    offload_patience: Annotated[float, option(settings.OFFLOAD_PATIENCE_S, "--offload-patience", metavar="SECONDS", help="With --offload URL: give up after so long without an answer, retries included.")] = 60.0,
    allow_drop: Annotated[bool, typer.Option("--allow-drop", help="Forget pages that do not fit, instead of writing them to flash (unless --offload is given). Changes results.")] = False,
    max_write_per_day: Annotated[int | None, option(settings.MAX_WRITE_PER_DAY, "--max-write-per-day", help="What all runs with this offload folder (or session) may write to flash in a day, UTC. Beyond it pages stay in RAM as far as they fit. See `edgekv stats`.")] = None,
    pressure: Annotated[PressureMode, option(settings.PRESSURE, "--pressure", help="auto: give memory back when a control group nears its limit or the system stalls for memory (Linux).")] = PressureMode.AUTO,
    session: Annotated[Path | None, option(settings.FILE, "--session", metavar="FILE", help="Keep the sequence in FILE (a folder) across runs; what a later prompt shares with it is not computed again. Pages are INT8.")] = None,
    resume: Annotated[bool, typer.Option("--continue", help="Go on with the session where it stopped; a prompt is added to its end.")] = False,
    checkpoint_every: Annotated[settings.Interval | None, option(settings.CHECKPOINT_EVERY, "--checkpoint-every", help="Save the session after so many new tokens (64) or seconds (30s), and at the end. Default: 64.")] = None,
    encrypt: Annotated[bool, typer.Option("--encrypt", help="Encrypt the session with a key from --key-file, $EDGEKV_SESSION_KEY or the keyring. Without --session: encrypt offloaded pages with a key that ends with the process.")] = False,
    key_file: Annotated[Path | None, option(settings.FILE, "--key-file", metavar="FILE", help="Secret of 16 bytes or more; implies --encrypt.")] = None,
    temperature: Annotated[float | None, option(settings.TEMPERATURE, "--temperature", "-t", help="0 is greedy. Default: what the makers of a chat model say (`edgekv inspect`); 0 with --raw, and for other models. So for the next three.")] = None,
    top_p: Annotated[float | None, option(settings.TOP_P, "--top-p", help="Keep the most likely tokens up to this mass.")] = None,
    top_k: Annotated[int | None, option(settings.TOP_K, "--top-k", help="Keep this many tokens; 0 keeps all.")] = None,
    repetition_penalty: Annotated[float | None, option(settings.REPETITION_PENALTY, "--repetition-penalty", help="Above 1 makes repeated tokens less likely.")] = None,
    seed: Annotated[int | None, option(settings.SEED, "--seed", help="Equal seeds give equal text. Default: another one each time; --json says which.")] = None,
    stop: Annotated[list[str] | None, option(settings.STOP, "--stop", help="End before this string; may be given several times.")] = None,
    threads: Annotated[int | None, option(settings.THREADS, "--threads", help="Default: the cores of this process, 4 at the most.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object (text and statistics) instead of text.")] = False,
    stats: Annotated[Path | None, option(settings.FILE, "--stats", metavar="FILE", help="Write the statistics to a file, as JSON.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No statistics on stderr.")] = False,
) -> None:  # fmt: skip
    """Generate text from a bundle, inside a memory budget. The text goes to stdout, everything else to stderr."""
    from edgekv.runtime.generate import Generator, RunOptions, default_threads

    given = [
        name
        for name, value in (("--prompt", prompt), ("--prompt-file", prompt_file), ("--chat", chat or None))
        if value is not None
    ]
    if len(given) != 1 and not (resume and not given):
        raise UsageError(
            "give one of --prompt, --prompt-file or --chat" + (f", not {' and '.join(given)}" if given else "")
        )
    if raw and chat:
        raise UsageError("--raw is for prompts: a conversation is held in the words of the chat template")
    if system is not None and not chat and (raw or resume):
        raise UsageError(f"--system needs the chat template, which {'--raw' if raw else '--continue'} does without")
    kept = session_options(session, resume, checkpoint_every, encrypt and session is not None, key_file)
    if stats is not None:
        check_writable(stats, "--stats")
    if kv_budget and profile:
        raise UsageError("give --kv-budget or --profile, not both: the profile sets the budget")
    if chat and context is None:
        context = min(read_manifest(bundle).model.max_context, CHAT_CONTEXT)
    console = stderr()
    budget: int | str | None = kv_budget
    if profile:
        budget = profile_budget(profile, bundle, console, quiet=quiet)
    _say_if_foreign(bundle)
    options = RunOptions(
        kv_budget=budget, kv=kv, context=context, policy=policy, allow_drop=allow_drop, attend=attend,
        offload=offload, flash_limit=flash_limit,
        offload_patience_s=offload_patience, encrypt_offload=encrypt and session is None,
        threads=threads or default_threads(), own_process=True, session=kept, max_write_per_day=max_write_per_day,
        pressure=pressure,
    )  # fmt: skip
    text = read_text(prompt_file, "--prompt-file") if prompt_file is not None else prompt
    signals = command.find_object(Signals) or Signals()
    with Generator.open(bundle, options) as generator, _saved_when_interrupted(generator):
        if generator.kernels.isa() == "numpy":
            print("edgekv: the native kernels are not built; NumPy is used, many times slower", file=sys.stderr)

        if generator.session is not None and generator.session.read_only:
            print(f"edgekv: {generator.session.path} is not saved: {generator.session.read_only}", file=sys.stderr)
        asked = {
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty,
        }  # fmt: skip
        chats = chat or (not raw and generator.text.chats)
        templated = chat or (chats and not resume)
        if system is not None and not templated:
            raise UsageError("--system is a message, and this model knows no messages: it has no chat template")
        sampling = chosen(asked, generator.manifest.sampling if chats else None, seed)
        manner = Manner(sampling, max_tokens)
        if pin_prompt and chat:
            _check_system(remembered(generator, system))

        before: list[int] = []  # of which the answer is the next part

        def stream(request: str | list[int], pinned: int, progress: Progressed) -> Iterator[str]:
            def advance(done: int, total: int) -> None:
                signals.check()
                progress(done, total)

            pieces = generator.stream(
                request,
                max_tokens=manner.max_tokens,
                sampling=manner.sampling.options,
                stop=stop or [],
                before=before,
                pin=pinned,
                progress=advance,
            )
            with signals.between_tokens(), closing(pieces):
                for piece in pieces:
                    yield piece
                    signals.check()

        def answer(request: str | list[int], pinned: int, said: list[str]) -> None:
            if as_json:
                said.extend(stream(request, pinned, lambda done, total: None))
                facts = _stats(generator, manner.sampling)
                print_json_line({"text": "".join(said), "chat_template": templated, **facts})
            else:
                _print_stream(lambda progress: stream(request, pinned, progress), console, said)

        if chat:
            assert context is not None
            converse(
                generator,
                answer,
                console,
                system,
                context=context,
                manner=manner,
                pin=pin_prompt,
                summary=lambda: _summary(generator, manner.sampling, templated),
                secret=encrypt or key_file is not None,
                signals=signals,
            )
        else:
            request: str | list[int] | None = text
            if templated:
                request = generator.text.encode_chat(_messages(system, text))
            elif resume:
                request = continued(generator, text)
                before = [] if text else request
            assert request is not None
            if pin_prompt and isinstance(request, str):
                request = generator.text.encode(request)
            try:
                answer(request, len(request) if pin_prompt else 0, [])
            finally:
                if resume:
                    retell(generator)
        if stats is not None:
            write_text(stats, json.dumps(_stats(generator, manner.sampling)) + "\n", "--stats")
        if not quiet and not as_json:
            _summary(generator, manner.sampling, templated).print(console)
        elif generator.session is not None:  # what was said before and had to be computed again is never passed over
            for problem in generator.session.problems:
                print(f"edgekv: {generator.session.path}: {problem}", file=sys.stderr)


def _messages(system: str | None, prompt: str | None) -> list[dict[str, str]]:
    assert prompt is not None
    said = [{"role": "system", "content": system}] if system else []
    return [*said, {"role": "user", "content": prompt}]


def profile_budget(name: str, bundle: Path, console: Console, *, quiet: bool) -> int:
    """Return the bytes that a device has for keys and values beside the weights of a bundle, and print how they come about.

    Raises:
        ProfileError: there is no such device, or it has too little.
    """
    from edgekv.device_profiles import kv_budget, load
    from edgekv.runtime.pages.budget import RUNTIME_OVERHEAD_BYTES

    manifest = read_manifest(bundle)
    budget = kv_budget(load(name), manifest.weights_bytes(), RUNTIME_OVERHEAD_BYTES)
    if not quiet:
        console.print(f"{name}: {budget}", style="dim", highlight=False)
    return budget.kv_bytes


def _say_if_foreign(bundle: Path) -> None:
    """Say that a bundle was made for other processors, where that makes a difference: only 4-bit products are theirs alone."""
    manifest, here = read_manifest(bundle), machine_class()
    if manifest.made_for in (None, here) or manifest.weights != "int4" or manifest.form != "split":
        return
    operators = f" with {manifest.operators} operators" if manifest.operators is not None else ""
    print(
        f"edgekv: {bundle} was made for {manifest.made_for} ({manifest.engine}{operators}), and this is {here}: it may be slow;"
        " export it with --target PROFILE of this device",
        file=sys.stderr,
    )


@contextmanager
def _saved_when_interrupted(generator: Generator) -> Iterator[None]:
    """Let the line of an interrupted run say that its session is saved: closing the generator does that, or fails."""
    try:
        yield
    except Interrupted as end:
        session = generator.session
        if session is not None and session.path == getattr(generator.options.session, "path", None):
            end.note = f"the session {session.path} is " + (
                f"not saved: {session.read_only}" if session.read_only else "saved"
            )
        raise


def _check_system(messages: list[dict[str, str]]) -> None:
    if not messages or messages[0]["role"] != "system":
        raise UsageError("--pin-prompt with --chat pins the system message: give one with --system")


def _print_stream(stream: Callable[[Progressed], Iterator[str]], console: Console, said: list[str]) -> None:
    """Print text as it comes and add it to ``said``, with a progress bar on stderr while the prompt is read."""
    columns = (
        TextColumn("reading the prompt"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("prefill", total=None)

            def advance(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)
                if done == total:
                    progress.stop()

            for piece in stream(advance):
                said.append(piece)
                print(piece, end="", flush=True)
    except (Interrupted, EdgeKVError) as error:
        if said or isinstance(error, Interrupted):
            print(flush=True)  # what is said of it is a line of its own
        raise
    print(flush=True)


def _stats(generator: Generator, sampling: Sampling) -> dict[str, Any]:
    stats = generator.report()
    return {
        **asdict(stats),
        "prefill_tokens_per_s": stats.prefill_tokens_per_s,
        "decode_tokens_per_s": stats.decode_tokens_per_s,
        "kernels": generator.kernels.isa(),
        "engine": generator.engine,
        "sampling": sampling.facts(),
        **session_facts(generator),
    }


def _summary(generator: Generator, sampling: Sampling, templated: bool) -> Facts:
    stats = generator.report()
    table = Facts()
    table.add_row(
        "prompt",
        f"{stats.prefill_tokens} tokens{' with the chat template' if templated else ''}, {stats.prefill_tokens_per_s:.0f}/s"
        + (f", {stats.reused_tokens} reused" if stats.reused_tokens else ""),
    )
    if generator.session is not None:
        table.add_row("session", session_line(generator))
    if stats.unused_prefix_tokens:
        table.add_row(
            "prefix",
            f"{stats.unused_prefix_tokens} cached tokens not used: their pages are INT8, and this run keeps fp16; --kv int8 uses them",
        )
    table.add_row("engine", f"{generator.engine}, {generator.manifest.weights} weights")
    full = "; the context is full, raise --context for more" if stats.context_full else ""
    table.add_row("generated", f"{stats.decode_tokens + 1} tokens, {stats.decode_tokens_per_s:.1f}/s{full}")
    table.add_row("sampling", f"{sampling}" + (f", seed {stats.seed}" if stats.seed is not None else ""))
    table.add_row("peak memory", f"{format_bytes(stats.peak_rss_bytes)} (whole process, as the OS counts it)")
    if stats.cache is not None and generator.budget is not None:
        tiers = ", ".join(f"{format_bytes(size)} {tier}" for tier, size in stats.cache.bytes_by_tier.items() if size)
        table.add_row("keys and values", f"{tiers or '0 B'}; budget {format_bytes(generator.budget.budget_bytes)}")
        if stats.cache.pinned_pages:
            table.add_row("pinned", f"{stats.cache.pinned_pages} pages")
    if stats.pages is not None:
        moved = stats.pages
        table.add_row(
            "pages",
            f"{moved.pages_compressed} compressed, {moved.pages_offloaded} offloaded, {moved.pages_fetched} fetched, {moved.pages_dropped} dropped",
        )
        if stats.remote_bytes_written or stats.remote_bytes_read:
            table.add_row(
                "object store",
                f"{format_bytes(stats.remote_bytes_written)} written, {format_bytes(stats.remote_bytes_read)} read",
            )
        if stats.selection is not None:
            chosen = stats.selection
            table.add_row(
                "selective",
                f"{chosen.wanted_per_step:.0f} of {chosen.pages_per_step:.0f} pages per token, {chosen.hit_rate:.0%} of them in RAM,"
                f" {chosen.fetched_per_step:.1f} fetched",
            )
            table.add_row(
                "missed at most",
                f"of the attention mass, certified: {chosen.missing_mean.mean:.2%} on average over heads and layers"
                f" (p99 {chosen.missing_mean.p99:.2%}); worst head {chosen.missing_max.max:.2%}",
            )
        if stats.pressure is not None and stats.pressure.changes:
            short = stats.pressure
            table.add_row(
                "pressure",
                f"{short.changes} changes of the budget, now {format_bytes(short.budget_bytes)}; {format_bytes(short.freed_bytes)} given back"
                f" in {1000 * short.seconds:.0f} ms, {1000 * short.longest_s:.0f} ms at the most",
            )
        if moved.pages_held_back:
            table.add_row(
                "", "[yellow]the day's writes to flash are used up (--max-write-per-day): pages stayed in RAM[/yellow]"
            )
        if moved.pages_dropped:
            missed = f"{moved.pages_dropped} pages were dropped, and needed {moved.pages_missed} times since"
            table.add_row("", f"[yellow]{missed}: the text may differ from a run with more memory[/yellow]")
    return table
