"""The device model against what was measured."""
