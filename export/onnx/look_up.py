"""Rows of an embedding table that is stored as INT8 codes, looked up with operators that every ONNX Runtime has.

``GatherBlockQuantized`` of com.microsoft does it in one, but reads uint8 only from ONNX Runtime 1.23 on.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from .nodes import Nodes
from .pieces import Piece


def look_up(block: int, columns: int) -> Piece:
    """Return ids [T], rows [vocab, columns] uint8, scales [vocab, columns / block] -> values [T, columns] float32."""
    g = Nodes()
    codes = g("Gather", "rows", "ids")
    blocks = g("Reshape", g("Cast", codes, to=TensorProto.FLOAT), g.ints(-1, columns // block, block))
    centred = g("Sub", blocks, g.constant(np.float32(128)))
    scales = g("Gather", "scales", "ids")
    scaled = g("Mul", centred, g("Reshape", scales, g.ints(-1, columns // block, 1)))
    end = helper.make_node("Reshape", [scaled, g.ints(-1, columns)], ["values"], name="reshape_values")
    return Piece(("ids", "rows", "scales"), ("values",), (), tuple(g.constants.values()), (*g.nodes, end))
