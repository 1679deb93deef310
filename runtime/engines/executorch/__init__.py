"""ExecuTorch as an engine."""
