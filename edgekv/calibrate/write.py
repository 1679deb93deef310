"""A calibration as a profile file."""

from __future__ import annotations

import json
from collections.abc import Callable

from edgekv.host import MACHINES

from .calibration import Calibration
from .drive import SIZES, latency

#: Set beside a measured number where nothing was measured; `edgekv profiles show` marks them `low`.
_GUESS = "not measured; write your drive's or device's own number here"


def profile_toml(found: Calibration, *, name: str, title: str, kind: str, date: str) -> str:
    """Return a valid profile: measured numbers with confidence high, the rest low.

    Args:
        date: of the measurement, as it is to be printed.
    """
    measured = f"edgekv profiles calibrate, {date}, {found.threads} threads, {found.isa} kernels"

    def entry(key: str, value: float, source: str, confidence: str = "high") -> str:
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        return f'{key} = {{ value = {shown}, confidence = "{confidence}", source = {json.dumps(source)} }}'

    reads = ", ".join(f"{rate / 1e9:.1f} GB/s with {count}" for count, rate in found.read_bytes_per_s.items())
    drive, flash = found.drive, measured + ("" if found.drive.direct else ", through the page cache")
    lines = [
        f"# Merely reading memory: {reads} threads.",
        f"name = {json.dumps(name)}",
        f"title = {json.dumps(title)}",
        f"kind = {json.dumps(kind)}",
        *([f"processor = {json.dumps(found.machine)}"] if found.machine in MACHINES else []),
        "",
        "[memory]",
        entry("ram_bytes", found.ram_bytes, measured),
        entry("app_limit_bytes", found.available_bytes, f"available when measured: {measured}"),
        entry("os_page_bytes", found.os_page_bytes, measured),
        entry("headroom_share", 0.05, "estimate: allocator slack", "low"),
        f'kill = "{"swap" if found.swaps else "oom"}"',
        "",
        *_compute(found, measured, entry),
        "[flash]",
        entry("read_t0_s", latency(drive.read_s), f"fitted to {_sizes()}: {flash}"),
        entry("read_bytes_per_s", *_read_rate(found, flash)),
        entry("write_t0_s", latency(drive.write_s), f"fitted to {_sizes()}: {flash}"),
        entry("write_bytes_per_s", drive.write_bytes_per_s, f"1 MiB, four requests in flight: {flash}"),
        entry("queue_depth", 16, f"requests in flight when the limit was measured: {measured}"),
        entry("iops_limit", round(drive.requests_per_s), f"4 KiB, sixteen requests in flight: {flash}"),
        entry("write_buffer_bytes", 0, f"estimate: none that can be relied on; {_GUESS}", "low"),
        entry("endurance_tbw", 100, f"estimate; {_GUESS}", "low"),
        entry("write_amplification", 2, f"estimate; {_GUESS}", "low"),
        "",
        "[thermal]",
        entry("floor_share", 1, f"estimate: cooled; {_GUESS}", "low"),
        entry("time_constant_s", 120, f"estimate; {_GUESS}", "low"),
    ]
    return "\n".join(lines) + "\n"


def _read_rate(found: Calibration, flash: str) -> tuple[float, str]:
    """Return the bytes/s of the drive: a run may have had more than the drive alone, if others used it then."""
    alone = found.drive.read_bytes_per_s
    if found.engine_rates is not None and found.engine_rates.streamed_bytes_per_s > alone:
        return found.engine_rates.streamed_bytes_per_s, f"a token that streams its pages: {flash}"
    return alone, f"1 MiB, four requests in flight: {flash}"


def _compute(found: Calibration, measured: str, entry: Callable[..., str]) -> list[str]:
    rates, lines = found.engine_rates, []
    engine = found.engine or "onnx"
    threads = entry("threads", found.threads, measured)
    if rates is not None:
        source = f"one token and a prompt with a bundle of {found.weights} weights: {measured}"
        lines += [
            f"[compute.{engine}]",
            threads,
            entry("weight_read_bytes_per_s", rates.weight_read_bytes_per_s, source),
            entry("kv_read_bytes_per_s", rates.kv_read_bytes_per_s, f"contexts to 8192, INT8 pages: {source}"),
            entry(
                "kv_fp16_read_bytes_per_s", rates.kv_fp16_read_bytes_per_s, f"contexts to 8192, fp16 pages: {source}"
            ),
            entry("gemm_ops_per_s", rates.gemm_ops_per_s, source),
            entry("attention_ops_per_s", rates.attention_ops_per_s, source),
            entry("overhead_s", rates.overhead_s, f"a token beyond its weights: {source}"),
            entry("page_fetch_s", rates.page_fetch_s, f"tokens with a quarter of the fp16 cache in RAM: {source}"),
            entry("piece_fetch_s", rates.piece_fetch_s, f"tokens with a quarter of the fp16 cache in RAM: {source}"),
            "",
        ]
    if engine == "onnx":
        weights = found.weights or "int4"
        if rates is None:
            read, gemm = found.matrices[weights]
            lines += [
                "[compute.onnx]",
                threads,
                entry("weight_read_bytes_per_s", read, f"{weights} products alone: {measured}"),
                entry("kv_read_bytes_per_s", found.kv_read_bytes_per_s, f"INT8 pages, 4096 tokens: {measured}"),
                entry(
                    "kv_fp16_read_bytes_per_s", found.kv_fp16_read_bytes_per_s, f"fp16 pages, 4096 tokens: {measured}"
                ),
                entry("gemm_ops_per_s", gemm, f"{weights} products alone: {measured}"),
                entry("attention_ops_per_s", found.attention_ops_per_s, f"INT8 pages, 4096 tokens: {measured}"),
                entry("overhead_s", 0.005, "estimate: calls between 24 layers; measure with --bundle", "low"),
                entry("page_fetch_s", 0.0, "estimate, from one x86 CPU; measure with --bundle", "low"),
                entry("piece_fetch_s", 7e-5, "estimate, from one x86 CPU; measure with --bundle", "low"),
                "",
            ]
        for other, (read, gemm) in found.matrices.items():
            if other != weights:
                source = f"{other} products alone: {measured}"
                lines += [
                    f"[compute.onnx.{other}]",
                    entry("weight_read_bytes_per_s", read, source),
                    entry("gemm_ops_per_s", gemm, source),
                    "",
                ]
        if weights != "fp16":  # the CPU provider computes fp16 in fp32
            read, gemm = found.matrices["fp32"]
            lines += [
                "[compute.onnx.fp16]",
                entry("weight_read_bytes_per_s", read, f"as fp32: {measured}"),
                entry("gemm_ops_per_s", gemm, f"as fp32: {measured}"),
                "",
            ]
    return lines


def _sizes() -> str:
    return ", ".join(f"{size // 1024} KiB" for size in SIZES)
