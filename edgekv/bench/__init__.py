"""Tokens per second of a bundle on this machine: prompts read and tokens generated, at depths, with spread, memory and flash."""
