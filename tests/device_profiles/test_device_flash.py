"""The drive model: published request sizes come out, and no history makes it faster than its limits."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekv.device_profiles import Flash, load
from edgekv.device_profiles.flash import FlashDevice, streamed_seconds, years_of_life

SD = load("raspberry-pi-5-8gb").flash
NVME = load("raspberry-pi-5-8gb-nvme").flash


def changed(flash: Flash, **values: float) -> Flash:
    return dataclasses.replace(
        flash, **{key: dataclasses.replace(getattr(flash, key), value=value) for key, value in values.items()}
    )


@pytest.mark.parametrize(
    ("flash", "size", "published"),
    [(SD, 4096, 9.58e6), (SD, 2**20, 88.1e6), (NVME, 4096, 71.4e6), (NVME, 2**20, 442e6)],
)
def test_reads_one_at_a_time_reach_the_published_bandwidth(flash: Flash, size: int, published: float) -> None:
    device, now = FlashDevice(flash), 0.0
    for _ in range(100):
        now = device.read(now, size)
    assert device.bytes_read / now == pytest.approx(published, rel=0.05)


def test_a_deep_queue_hides_the_latency_up_to_the_iops_limit() -> None:
    # fio with a deep queue, NVMe drive in a Pi 5: 103,434 requests/s of 4 KiB (pcie-devices#632).
    device = FlashDevice(NVME)
    done = max(device.read(0.0, 4096) for _ in range(10_000))
    assert 10_000 / done == pytest.approx(103_000, rel=0.05)


@given(requests=st.lists(st.tuples(st.floats(0, 0.01), st.integers(1, 2**20)), min_size=1, max_size=60))
def test_no_history_of_reads_beats_bandwidth_latency_or_iops(requests: list[tuple[float, int]]) -> None:
    device, now, ends = FlashDevice(NVME), 0.0, []
    for gap, size in requests:
        now += gap
        done = device.read(now, size)
        assert done >= now + NVME.read_t0_s.value + size / NVME.read_bytes_per_s.value - 1e-12
        ends.append(done)
    first = requests[0][0]
    assert max(ends) - first >= device.bytes_read / NVME.read_bytes_per_s.value - 1e-9
    assert max(ends) - first >= (len(requests) - 1) / NVME.iops_limit.value - 1e-9


def test_equal_histories_take_equal_time() -> None:
    def run() -> list[float]:
        device = FlashDevice(SD)
        return [device.write(index * 0.001, 4096 * (index % 7 + 1)) for index in range(200)]

    assert run() == run()


def test_writes_are_quick_while_the_buffer_lasts_and_then_as_fast_as_it_drains() -> None:
    flash = changed(NVME, write_buffer_bytes=4 * 2**20)
    device = FlashDevice(flash)
    burst = device.write(0.0, 4 * 2**20)
    assert burst == pytest.approx(flash.write_t0_s.value)
    now = burst
    for _ in range(64):
        now = device.write(now, 2**20)
    # All bytes but those that still lie in the buffer have drained.
    assert now - burst == pytest.approx(64 * 2**20 / flash.write_bytes_per_s.value, rel=0.01)
    later = now + 1.0
    assert device.write(later, 2**20) - later == pytest.approx(flash.write_t0_s.value)


def test_without_a_buffer_a_write_ends_when_its_bytes_are_on_the_medium() -> None:
    device = FlashDevice(SD)
    assert device.write(0.0, 22_000_000) == pytest.approx(1.0 + SD.write_t0_s.value)


def test_wear_counts_what_the_medium_programs() -> None:
    flash = changed(SD, endurance_tbw=1.0, write_amplification=4.0)
    device = FlashDevice(flash)
    device.write(0.0, 25_000_000_000)
    assert device.wear_share == pytest.approx(0.1)


def test_the_life_of_a_card_is_the_published_one() -> None:
    # 16.5 GB a day on 117 TBW: 19 years without write amplification, 4 years at 5.
    assert years_of_life(changed(SD, write_amplification=1.0), 16.5e9) == pytest.approx(19.4, abs=0.1)
    assert years_of_life(changed(SD, write_amplification=5.0), 16.5e9) == pytest.approx(3.9, abs=0.1)
    assert years_of_life(SD, 0) == float("inf")


@pytest.mark.parametrize("flash", [SD, NVME])
@pytest.mark.parametrize("request_bytes", [4096, 65536, 2**20])
def test_streaming_takes_what_the_drive_takes_with_a_full_queue(flash: Flash, request_bytes: int) -> None:
    device = FlashDevice(flash)
    n = 500
    done = max(device.read(0.0, request_bytes) for _ in range(n))
    assert streamed_seconds(flash, n * request_bytes, request_bytes) == pytest.approx(done, rel=0.25)
