"""`edgekv serve`: answer programs over HTTP, in the words of the OpenAI API."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from edgekv import settings
from edgekv.bundle import read_manifest
from edgekv.errors import EngineMissing, UsageError
from edgekv.schema import shown
from edgekv.tiers import Together

from .interrupt import Interrupted
from .options import option, whole
from .output import print_json_line, stderr
from .run import profile_budget
from .sampling import chosen

EPILOG = """
Examples:

`edgekv serve demo.edgekv` and open http://127.0.0.1:8080

`edgekv serve llama.edgekv --profile raspberry-pi-5-8gb --context 8192`

`edgekv serve llama.edgekv --kv-budget 256MiB --parallel 4 --cache-dir cache --cache-limit 4GiB`

`edgekv serve llama.edgekv --host 0.0.0.0 --api-key-file keys.txt`
"""


def serve_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder made by `edgekv export`.")],
    host: Annotated[str, option(settings.WORD, "--host", help="Address to listen on. Another than this machine alone: give --api-key-file, too.")] = "127.0.0.1",
    port: Annotated[int, option(whole("port", 0, 65_535), "--port", help="0: any free one.")] = 8080,
    profile: Annotated[str | None, option(settings.PROFILE, "--profile", help="Device whose memory sets the KV budget; see `edgekv profiles`.")] = None,
    kv_budget: Annotated[str | None, option(settings.KV_BUDGET, "--kv-budget", help="RAM for keys and values of all requests together: 64MiB, or 25% of the fp16 cache of the context.")] = None,
    context: Annotated[int | None, option(settings.CONTEXT, "--context", help="Tokens of prompt and answer together, of each request. Default: 8192, or what the model was made for.")] = None,
    parallel: Annotated[int, option(settings.PARALLEL, "--parallel", help="Requests that are answered at once.")] = 2,
    queue: Annotated[int, option(whole("queue", 0, 100_000), "--queue", help="Requests that may wait; further ones are told to come again (429).")] = 32,
    cache_dir: Annotated[Path | None, option(settings.FILE, "--cache-dir", metavar="DIR", help="Keep there what requests leave behind, also across restarts: what a later prompt begins with is not computed again.")] = None,
    cache_limit: Annotated[int, option(settings.CACHE_LIMIT, "--cache-limit", help="With --cache-dir: so much at the most; what was not used for longest goes first.")] = 8 << 30,
    max_write_per_day: Annotated[int | None, option(settings.MAX_WRITE_PER_DAY, "--max-write-per-day", help="What may be written to flash in a day, UTC.")] = None,
    encrypt: Annotated[bool, typer.Option("--encrypt", help="Encrypt the cache with a key from --key-file, $EDGEKV_SESSION_KEY or the keyring.")] = False,
    key_file: Annotated[Path | None, option(settings.FILE, "--key-file", metavar="FILE", help="Secret of 16 bytes or more; implies --encrypt.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Every answer is, to the bit, that of a run of its own; the turns of a conversation are then read again from each answer on.")] = False,
    together: Annotated[Together, option(settings.Mode("together", Together), "--together", help="auto: answers that are written at once share a step where each gets the same bits as alone, and sooner (tried at the start). always: also where the last bits then depend on what else is answered. never: one after the other.")] = Together.AUTO,
    model_name: Annotated[list[str] | None, option(settings.WORD, "--model-name", help="Name of the model for clients, beside that of the bundle; may be given several times.")] = None,
    api_key_file: Annotated[Path | None, option(settings.FILE, "--api-key-file", metavar="FILE", help="Keys, one a line; clients must show one of them. Nobody else may read the file.")] = None,
    isolate: Annotated[bool, typer.Option("--isolate", help="Clients with different keys share no pages, so that none can tell by the time what another one asked.")] = False,
    request_timeout: Annotated[float, option(settings.REQUEST_TIMEOUT_S, "--request-timeout", metavar="SECONDS", help="A request that takes longer is ended.")] = 600.0,
    body_limit: Annotated[int, option(settings.BODY_LIMIT, "--body-limit", help="A request may be so large.")] = 8 << 20,
    cors_origin: Annotated[list[str] | None, option(settings.WORD, "--cors-origin", metavar="URL", help="Pages of this site may ask, such as https://example.org; may be given several times. Default: no other site's.")] = None,
    allow_host: Annotated[list[str] | None, option(settings.WORD, "--allow-host", metavar="NAME", help="A further name that clients call this server by; may be given several times.")] = None,
    grace: Annotated[float, option(settings.GRACE_S, "--grace", metavar="SECONDS", help="At the end, answers may go on for so long.")] = 5.0,
    temperature: Annotated[float | None, option(settings.TEMPERATURE, "--temperature", "-t", help="Where a request does not say; 0 is greedy. Default: in conversations, what the makers of the model say (`edgekv inspect`); else 0. So for the next three.")] = None,
    top_p: Annotated[float | None, option(settings.TOP_P, "--top-p", help="Keep the most likely tokens up to this mass.")] = None,
    top_k: Annotated[int | None, option(settings.TOP_K, "--top-k", help="Keep this many tokens; 0 keeps all.")] = None,
    repetition_penalty: Annotated[float | None, option(settings.REPETITION_PENALTY, "--repetition-penalty", help="Above 1 makes repeated tokens less likely.")] = None,
    threads: Annotated[int | None, option(settings.THREADS, "--threads", help="Default: the cores of this process, 4 at the most.")] = None,
    prefill_chunk: Annotated[int, option(settings.PREFILL_CHUNK, "--prefill-chunk", help="Tokens of a prompt that are read at once; others wait as long.")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print where it answers as a JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No line for each request on stderr.")] = False,
) -> None:  # fmt: skip
    """Answer programs over HTTP, in the words of the OpenAI API, and people with a page. Ctrl-C ends it."""
    manifest = read_manifest(bundle)
    _require_serve()
    from edgekv.runtime.generate import RunOptions, default_threads
    from edgekv.runtime.serving.service import Service, ServiceOptions
    from edgekv.runtime.storage.cipher import find_secret
    from edgekv.serve.face import Face
    from edgekv.serve.guard import is_loopback
    from edgekv.serve.options import FaceOptions, Keys
    from edgekv.serve.server import Server, address_of, listen

    if kv_budget and profile:
        raise UsageError("give --kv-budget or --profile, not both: the profile sets the budget")
    for origin in cors_origin or []:
        _check_origin(origin)
    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
    options = FaceOptions(
        names=tuple(dict.fromkeys([*(model_name or []), bundle.resolve().name.removesuffix(".edgekv")])),
        host=host,
        allowed_hosts=tuple(allow_host or []),
        keys=Keys.read(api_key_file) if api_key_file is not None else Keys(),
        isolate=isolate,
        cors_origins=tuple(cors_origin or []),
        sampling=chosen(asked, manifest.sampling, None).options,
        plain_sampling=chosen(asked, None, None).options,
        request_timeout_s=request_timeout,
        body_bytes=body_limit,
    )
    run = RunOptions(
        kv_budget=profile_budget(profile, bundle, stderr(), quiet=quiet) if profile else kv_budget,
        context=context, threads=threads or default_threads(), prefill_chunk=prefill_chunk, own_process=True,
        max_write_per_day=max_write_per_day,
    )  # fmt: skip
    serving = ServiceOptions(
        run,
        parallel=parallel,
        queue=queue,
        cache_dir=cache_dir,
        cache_limit_bytes=cache_limit,
        secret=find_secret(key_file) if encrypt or key_file is not None else None,
        exact=exact,
        together=together,
    )
    with listen(host, port) as listener:
        service = Service(bundle, serving)
        try:
            if not quiet:
                _show_requests()
            if not is_loopback(host) and not options.keys:
                print(
                    f"edgekv: everyone who reaches {host} may ask; --api-key-file names those who may", file=sys.stderr
                )
            server = Server(Face(service, bundle, options), listener)
            url = address_of(listener, host)
            if as_json:
                print_json_line({"url": url, "models": options.names, "context": service.context})
            else:
                print(f"{options.names[0]} answers at {url} (a page for people, /v1 for programs)", flush=True)
            try:
                server.wait()
            except Interrupted:
                server.close(grace)
                raise
        finally:
            service.close()


def _check_origin(origin: str) -> None:
    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}":
        raise UsageError(
            f"--cors-origin must be a site such as https://example.org, without a path, not {shown(origin)}"
        )


def _require_serve() -> None:
    try:
        import fastapi  # noqa: F401
        import llguidance  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise EngineMissing(f"`edgekv serve` needs {error.name}: pip install 'edgekv[serve]'") from error


def _show_requests() -> None:
    """Print a line for each request: never what was asked or answered."""
    log = logging.getLogger("edgekv.serve.access")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
