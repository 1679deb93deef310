"""ONNX Runtime, as all of edgekv imports it: it looks for devices as it loads, and does not tell the terminal."""

from edgekv.logs import quiet_while_loading

with quiet_while_loading():
    import onnxruntime as onnxruntime
