"""Inference engines for the dense parts of a decoder. Nothing above this folder knows which one runs."""
