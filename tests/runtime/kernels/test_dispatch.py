"""Which kernels are chosen: by the processor, by EDGEKV_ISA, or NumPy where there is no extension."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekv.runtime.kernels.choose import load_kernels


@pytest.mark.parametrize("isa", load_kernels().available_isas())
def test_the_environment_chooses_the_instruction_set(isa: str) -> None:
    if isa == "numpy":
        pytest.skip("the native extension is not built")
    code = "from edgekv.runtime.kernels.choose import load_kernels; print(load_kernels('native').isa())"
    root = str(Path(__file__).resolve().parents[3])
    environment = {**os.environ, "EDGEKV_ISA": isa, "PYTHONPATH": root}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == isa
    environment["EDGEKV_ISA"] = "nonsense"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "EDGEKV_ISA must be one of" in run.stderr


def test_without_the_extension_the_numpy_kernels_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "edgekv.runtime._kernels", None)
    assert load_kernels().isa() == "numpy"
    with pytest.raises(ImportError):
        load_kernels("native")
