"""Kernels and segments alone."""
