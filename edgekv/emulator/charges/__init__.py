"""What the parts of a step cost an emulated device."""
