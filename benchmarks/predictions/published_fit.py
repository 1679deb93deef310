"""Few-parameter fits of the device model to published rows of one device and engine.

Fitted is one rate per pair, with a factor per weight format and per model family (kernels are tuned for some and not for
others), and, for decode, a time per layer. Factors are held near 1 and the time per layer near a typical one by priors, so that
a pair with few rows keeps few free parameters; what an engine's kernels show on other devices is expected here too. Huber
weights keep one odd row from bending the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgekv.device_profiles import Compute, Flash, Quantity, load
from edgekv.device_profiles.speed import paged_seconds, step_seconds

from .published_rows import Row

Vector = NDArray[np.float64]

#: Spread of repeated measurements that agree (run to run, firmware, build): 5 %.
NOISE = 0.05
#: How far factors stray from 1 (standard deviation of the logarithm): unpacking costs differ by format far more in prefill.
FORMAT_SPREAD = {"decode": 0.2, "prefill": 0.5}
FAMILY_SPREAD = 0.25
#: Mixtures of experts gather rows: what that costs differs more.
EXPERTS_SPREAD = 0.5
#: Formats that one kernel multiplies, so that they share a factor; what sets them apart is small.
_KERNELS = {"SpinQuant": "int4, groups of 32", "QLoRA": "int4, groups of 32"}
#: Work of a prompt beside its matrices, in operations per token, layer and channel: norms, copies; CPUs, GPUs, spread.
CHANNEL_OPS_CPU, CHANNEL_OPS_GPU = 2e3, 2e4
#: Seconds per layer beside the reading of weights, and how far that strays: norms, and on a GPU launches of kernels, which the
#: processor beside it does: one of a Mac or PC has about twice the speed of a phone's or a Jetson's.
LAYER_S_CPU, LAYER_S_GPU, LAYER_S_DESKTOP_GPU = 10e-6, 100e-6, 50e-6
#: The cache is read at this share of the weights' bandwidth, and how far that strays (CPUs: 12-61 % measured).
KV_CPU, KV_GPU = 0.3, 1.0
#: Attention of a prompt runs at this share of its matrix rate (0.36-0.55 measured, from pp512 and pp4096 of three CPUs).
ATTENTION_SHARE = 0.45
#: Operations of a prompt per byte that decode reads in the same time: what AGX Orin has of both, 42.5 dense fp16 TFLOPS (a
#: quarter of its GPU's 170 sparse INT8 TOPS) and 204.8 GB/s (data sheet); Orin Nano has 160.
OPS_PER_BYTE = 207.0
#: How far those stray (standard deviation of the logarithm).
_SHARES = {"layer_s": 1.0, "channel_ops": 1.0, "kv": 0.7, "ops_per_byte": 0.3}
_SIXTEEN_BIT = "format 16-bit"
_DESKTOP = ("Mac", "RTX", "PC")
_GPU = ("Metal", "CUDA", "GPU", "MLX", "MLC", "vLLM", "embedl", "NPU", "Hexagon")


@dataclass(frozen=True)
class Fit:
    """Rates of one (device, engine): ``rate`` in bytes/s (decode) or ops/s (prefill) and factors on it by kernel and family.

    ``shares``: ``layer_s``, decode, time per layer; ``channel_ops``, prefill, further operations per token, layer and channel;
    ``kv``, bandwidth of reading the cache, in units of ``rate``; ``ops_per_byte``, rate of a prompt that is in a decoded token's
    time, in the same units. ``flash``: what a model that exceeds the RAM pages from; None if no row says how fast that is.
    """

    kind: str
    rate: float
    factors: dict[str, float]
    shares: dict[str, float]
    flash: Flash | None = None

    def compute(self, row: Row) -> Compute:
        """Return what the fit says of the engine in a profile's terms, for the format and family of a row."""
        rate = self.rate * math.prod(self.factors.get(key, 1.0) for key in _keys(row))
        if self.kind == "decode":
            if row.weights.plain:
                packed = math.prod(self.factors.get(key, 1.0) for key in _format_keys(row))
                plain = self.factors.get(_SIXTEEN_BIT, 1.0)
                rate *= row.weights.read / (row.weights.packed + row.weights.plain * packed / plain)
            return _compute(
                rate, self.shares["kv"] * self.rate, 1e18, 1e18, self.shares["layer_s"] * row.shape.n_layers
            )
        further = self.shares["channel_ops"] * row.prompt * row.shape.n_layers * row.shape.hidden_size
        return _compute(1e18, 1e18, rate, ATTENTION_SHARE * rate, further / self.rate)

    def seconds(self, row: Row) -> float:
        """Return the time of one decoded token, or of the whole prompt, paging included."""
        work = row.decode_work() if self.kind == "decode" else row.prefill_work()
        seconds = step_seconds(work, self.compute(row)).total
        if self.kind == "decode" and row.prompt_share:
            seconds += self.prompt_seconds(row)
        if row.paged and self.flash is not None:
            seconds += paged_seconds(row.weights.read, 0.0, self.flash)
        return seconds

    def prompt_seconds(self, row: Row) -> float:
        """Return the time of the prompt's tokens that are computed for each decoded token."""
        ops = row.prefill_work().ops / row.prompt
        return row.prompt_share * ops / (self.shares["ops_per_byte"] * self.rate)

    def tokens_per_s(self, row: Row) -> float:
        """Return the predicted figure of a row."""
        return (1 if self.kind == "decode" else row.prompt) / self.seconds(row)


def _format_keys(row: Row) -> tuple[str, ...]:
    kernel = _KERNELS.get(row.format)
    return (*([f"kernel {kernel}"] if kernel else []), f"format {row.format}")


def _keys(row: Row) -> tuple[str, ...]:
    """Return the names of the factors that a row's rate has."""
    # What is shaped like Llama (Qwen, Mistral, Phi, SmolLM, ...) is the rule that the others are exceptions to.
    families = [] if row.family == "llama" else [f"family {row.family}"]
    return *_format_keys(row), *families


def _compute(weights: float, kv: float, gemm: float, attention: float, overhead_s: float) -> Compute:
    def made(value: float, unit: str) -> Quantity[float]:
        return Quantity(value, unit, "fitted to published rows", "medium")

    return Compute(
        threads=Quantity(1, "threads", "as published", "medium"),
        weight_read_bytes_per_s=made(weights, "bytes/s"),
        kv_read_bytes_per_s=made(kv, "bytes/s"),
        kv_fp16_read_bytes_per_s=made(kv, "bytes/s"),
        gemm_ops_per_s=made(gemm, "ops/s"),
        attention_ops_per_s=made(attention, "ops/s"),
        overhead_s=made(overhead_s, "s"),
        page_fetch_s=made(0.0, "s"),
        piece_fetch_s=made(0.0, "s"),
    )


def fit_decode(rows: Sequence[Row], elsewhere: Sequence[Row] = ()) -> Fit | None:
    """Fit the rows of one device and engine; None if none of them is resident.

    ``elsewhere``: rows of the engine on other devices, which say what its kernels do well.
    """
    resident, paged = [row for row in rows if not row.paged], [row for row in rows if row.paged]
    if not resident:
        return None
    fitted = _fit(resident, "decode", None, _usual(elsewhere, "decode"))
    return replace(fitted, flash=_paging_flash(paged, fitted)) if paged else fitted


def fit_prefill(rows: Sequence[Row], flash: Flash | None, elsewhere: Sequence[Row] = ()) -> Fit | None:
    """Fit the rows of one device and engine; paged rows count if it is known how fast they page."""
    known = [row for row in rows if not row.paged or flash is not None]
    return _fit(known, "prefill", flash, _usual(elsewhere, "prefill")) if known else None


def _usual(rows: Sequence[Row], kind: str) -> dict[str, float]:
    """Return the logarithm of each factor of an engine as a mean over devices, shrunk by one device that has none.

    Shares are left out: they are the device's as much as the engine's.
    """
    by_device: dict[str, list[Row]] = {}
    for row in rows:
        if not row.paged and getattr(row, kind) is not None:
            by_device.setdefault(row.device, []).append(row)
    fits = [_fit(same, kind, None, {}) for same in by_device.values()]
    sums: dict[str, list[float]] = {}
    for one in fits:
        for key in one.factors.keys() - _SHARES.keys():
            sums.setdefault(key, []).append(math.log(one.factors[key]))
    return {key: sum(logs) / (len(logs) + 1) for key, logs in sums.items()}


def _fit(rows: Sequence[Row], kind: str, flash: Flash | None, usual: Mapping[str, float]) -> Fit:
    """Fit by damped Gauss-Newton on the logarithms of predicted over published.

    ``usual``: logarithms of factors that are expected, for those that rows say nothing of too.
    """
    keys = sorted({key for row in rows for key in _keys(row)} | set(usual) | set(_SHARES))
    if any(row.weights.plain for row in rows) and _SIXTEEN_BIT not in keys:
        keys.append(_SIXTEEN_BIT)
    spreads = [_spread(key, rows, kind) for key in keys]
    shares = _usual_shares(rows[0])

    def made(theta: Vector) -> Fit:
        factors = dict(zip(keys, np.exp(theta[1:]).tolist(), strict=True))
        scaled = {name: shares[name] * factors[name] for name in _SHARES}
        return Fit(kind, math.exp(theta[0]), factors, scaled, flash)

    def residuals(theta: Vector) -> Vector:
        guess = made(theta)
        misses = [math.log(guess.seconds(row) / published_seconds(row, kind)) / NOISE for row in rows]
        return np.array([*misses, *((theta[1:] - means) / spreads)])

    means = np.array([usual.get(key, 0.0) for key in keys])
    start = np.array([0.0, *means])
    start[0] = math.log(np.median([_rate(row, kind) for row in rows]))
    return made(_minimise(residuals, start, len(rows)))


def _usual_shares(row: Row) -> dict[str, float]:
    """Return the shares that are usual for the processor of a row."""
    if not any(word in row.engine for word in _GPU):
        return {"layer_s": LAYER_S_CPU, "channel_ops": CHANNEL_OPS_CPU, "kv": KV_CPU, "ops_per_byte": OPS_PER_BYTE}
    layer_s = LAYER_S_DESKTOP_GPU if any(word in row.device for word in _DESKTOP) else LAYER_S_GPU
    return {"layer_s": layer_s, "channel_ops": CHANNEL_OPS_GPU, "kv": KV_GPU, "ops_per_byte": OPS_PER_BYTE}


def _spread(key: str, rows: Sequence[Row], kind: str) -> float:
    if key in _SHARES:
        return _SHARES[key]
    word, _, name = key.partition(" ")
    if word == "family":
        experts = any(row.family == name and row.shape.mlp_active_weights < row.shape.mlp_weights for row in rows)
        return EXPERTS_SPREAD if experts else FAMILY_SPREAD
    return FAMILY_SPREAD if word == "format" and name in _KERNELS else FORMAT_SPREAD[kind]


def published_seconds(row: Row, kind: str) -> float:
    """Return the published time of one token, or of the prompt."""
    if kind == "decode":
        assert row.decode is not None
        return 1 / row.decode
    assert row.prefill is not None
    return row.prompt / row.prefill


def _rate(row: Row, kind: str) -> float:
    work = row.decode_work() if kind == "decode" else row.prefill_work()
    return (work.weight_bytes if kind == "decode" else work.ops) / published_seconds(row, kind)


def _minimise(residuals: Callable[[Vector], Vector], theta: Vector, n_rows: int, rounds: int = 40) -> Vector:
    for _ in range(rounds):
        here = residuals(theta)
        jacobian = np.stack([(residuals(theta + step) - here) / 1e-5 for step in np.eye(len(theta)) * 1e-5], axis=1)
        weights = np.ones(len(here))
        weights[:n_rows] = np.minimum(1.0, 2.0 / np.maximum(np.abs(here[:n_rows]), 1e-9))  # Huber, beyond two sigma
        normal = jacobian.T @ (weights[:, None] * jacobian) + 1e-9 * np.eye(len(theta))
        step = np.linalg.solve(normal, -jacobian.T @ (weights * here))
        theta = theta + np.clip(step, -0.7, 0.7)
        if np.abs(step).max() < 1e-6:
            break
    return theta


def _paging_flash(rows: Sequence[Row], resident: Fit) -> Flash:
    """Return a drive with the bandwidth that paged rows show, beside the time that all in RAM would take."""
    shown = [row.weights.read / max(published_seconds(row, "decode") - resident.seconds(row), 1e-3) for row in rows]
    flash = load("raspberry-pi-5-8gb").flash
    return replace(
        flash,
        read_bytes_per_s=Quantity(float(np.median(shown)), "bytes/s", "fitted to paged rows", "medium"),
        read_t0_s=Quantity(0.0, "s", "in the bandwidth", "medium"),
    )
