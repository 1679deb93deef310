"""Attention and pages as computation: native kernels and their NumPy twins behind one interface."""
