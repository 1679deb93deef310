"""An ExecuTorch program put together from a template: the same structure with other weights, as often as needed.

Lowering a decoder layer by layer takes minutes, and the layers differ in nothing but their weights. A template has one
method per distinct segment and size; here each becomes a method per layer. The constants of a method are in two
places: XNNPACK's, under the sha256 of their bytes, which stands in the delegate's payload as text; and the
program's own table, by index. Both are exchanged; nothing else is.
"""

from __future__ import annotations

import copy
import hashlib
import mmap
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekv.errors import EngineError

from .weights import SCALE_PREFIX, Constant

_ALIGN_BYTES = 16
#: Constants up to this size may belong to the structure (an epsilon), above it they must be known weights.
_SMALL_BYTES = 16


class ProgramBuilder:
    """Collects methods; :meth:`save` writes the program. Weights wait in files, not in memory."""

    def __init__(self, template: Any, parameters: Mapping[str, list[Constant]], folder: Path) -> None:
        """Start an empty program.

        Args:
            template: an ``ExecutorchProgramManager``.
            parameters: every parameter of the template's methods, with its constants.
            folder: where weights wait in a temporary folder.
        """
        self._program = template.executorch_program
        self._plans = {plan.name: plan for plan in self._program.execution_plan}
        self._payloads = [bytes(entry.data) for entry in self._program.backend_delegate_data]
        # A delegate's scales have a prefix in their key, constants of the program have none.
        self._owner: dict[str, tuple[str, int]] = {
            key: (name, part)
            for name, constants in parameters.items()
            for part, constant in enumerate(constants)
            for key in (constant.key, constant.key.removeprefix(SCALE_PREFIX))
        }
        self._named = template._named_data
        self._check(parameters)
        self._result = copy.copy(self._program)
        self._result.execution_plan, self._result.backend_delegate_data = [], []
        self._result.constant_buffer = [self._program.constant_buffer[0]] if self._program.constant_buffer else []
        self._buffers: dict[str, int] = {}
        self._files: dict[str, Any] = {}
        self._alignments: dict[str, int] = {}
        self._waiting = tempfile.TemporaryDirectory(dir=folder, prefix=".weights-")

    def __enter__(self) -> ProgramBuilder:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.clear()
        self._waiting.cleanup()

    def add(self, template: str, name: str, parameters: Mapping[str, list[Constant]]) -> None:
        """Add method ``name``: the template's method with other weights.

        Args:
            parameters: constants of each of its parameters, as the template's parameters are named.
        """
        from executorch.exir.schema import BackendDelegateInlineData, Buffer

        plan = copy.deepcopy(self._plans[template])
        plan.name = name
        for delegate in plan.delegates:
            payload = self._rename(self._payloads[delegate.processed.index], parameters)
            delegate.processed.index = len(self._result.backend_delegate_data)
            self._result.backend_delegate_data.append(BackendDelegateInlineData(data=payload))
        for value in plan.values:
            index = getattr(value.val, "data_buffer_idx", 0)
            if index > 0:
                data = self._exchange(self._program.constant_buffer[index].storage, parameters)
                key = hashlib.sha256(data).hexdigest()
                if key not in self._buffers:
                    self._buffers[key] = len(self._result.constant_buffer)
                    self._result.constant_buffer.append(Buffer(storage=data))
                value.val.data_buffer_idx = self._buffers[key]
        self._result.execution_plan.append(plan)

    def save(self, path: Path) -> None:
        """Write the program."""
        from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
        from executorch.exir._serialize._program import PTEFile, serialize_pte_binary
        from executorch.exir._serialize.data_serializer import DataEntry

        keys = list(self._files)
        entries = {key: DataEntry(i, self._alignments[key], None) for i, key in enumerate(keys)}
        named = NamedDataStoreOutput([self._files[key] for key in keys], entries, {})
        binary = serialize_pte_binary(
            PTEFile(program=self._result, mutable_data=None, named_data=named), extract_delegate_segments=True
        )
        with path.open("wb") as stream:
            binary.write_to_file(stream)

    def _check(self, parameters: Mapping[str, list[Constant]]) -> None:
        """Make sure that every constant of the template is understood, so that none is left at its random value."""
        found = {self._owner[key] for key in self._named.pte_data if key in self._owner}
        for key in self._named.pte_data:
            size = len(self._named.buffers[self._named.pte_data[key].buffer_index])
            if key not in self._owner and not self._structural(key, size):
                raise EngineError(
                    f"executorch stores weights in a way that edgekv does not know ({size} bytes as {key[:20]})"
                )
        for buffer in self._program.constant_buffer[1:]:
            key = hashlib.sha256(buffer.storage).hexdigest()
            if key in self._owner:
                found.add(self._owner[key])
            elif len(buffer.storage) > _SMALL_BYTES:
                raise EngineError("executorch stores weights in a way that edgekv does not know (a program constant)")
        missing = {name for name, _ in set(self._owner.values()) - found}
        if missing:
            raise EngineError(f"executorch changed weights on the way: {', '.join(sorted(missing))}")

    def _structural(self, key: str, size: int) -> bool:
        """Whether a constant belongs to the structure: all its numbers are equal, as in a mean's weights."""
        data = self._named.buffers[self._named.pte_data[key].buffer_index]
        return size % 4 == 0 and bytes(data) == bytes(data[:4]) * (size // 4)

    def _rename(self, payload: bytes, parameters: Mapping[str, list[Constant]]) -> bytes:
        for key in self._named.pte_data:
            text = key.removeprefix(SCALE_PREFIX).encode()
            if text not in payload:
                continue
            entry = self._named.pte_data[key]
            if key in self._owner:
                name, part = self._owner[key]
                constant = parameters[name][part]
                payload = payload.replace(text, constant.key.removeprefix(SCALE_PREFIX).encode())
            else:
                constant = Constant(key, bytes(self._named.buffers[entry.buffer_index]))
            self._store(constant, entry.alignment)
        return payload

    def _exchange(self, data: bytes, parameters: Mapping[str, list[Constant]]) -> bytes:
        owner = self._owner.get(hashlib.sha256(data).hexdigest())
        return parameters[owner[0]][owner[1]].data if owner else data

    def _store(self, constant: Constant, alignment: int) -> None:
        from executorch.exir._serialize._cord import FileBackedData

        if constant.key not in self._files:
            path = Path(self._waiting.name) / constant.key
            path.write_bytes(constant.data)
            self._files[constant.key] = FileBackedData(str(path))
        self._alignments[constant.key] = max(alignment, self._alignments.get(constant.key, _ALIGN_BYTES))


def find_constant(program: Path, constant: Constant) -> int:
    """Return where the bytes of a constant lie in a program that was written.

    Raises:
        EngineError: nowhere as a whole.
    """
    with program.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        offset = mapped.find(constant.data)
    if offset < 0:
        raise EngineError(
            f"executorch stores weights in a way that edgekv does not know ({constant.key[:20]} in pieces)"
        )
    return offset
