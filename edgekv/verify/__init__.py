"""Proof, on the user's own model, that memory management keeps the quality: measure, compare, hold against a gate."""
