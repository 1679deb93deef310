"""From a Hugging Face checkpoint to a bundle (needs the extra `edgekv[export]`)."""

if __name__ != "edgekv.export":
    raise ImportError("import this package as edgekv.export")

from .bundle_writer import export_model

__all__ = ["export_model"]
