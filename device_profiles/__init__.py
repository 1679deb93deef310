"""Device profiles: what a phone, board or laptop really offers, each number with its source and a confidence."""

if __name__ != "edgekv.device_profiles":
    raise ImportError("import this package as edgekv.device_profiles")

from .budget import KVBudget, kv_budget
from .catalog import Difference, diff, load, load_many, names, user_dir
from .schema import Compute, DeviceProfile, Flash, Memory, Quantity, Thermal

__all__ = [
    "Compute",
    "DeviceProfile",
    "Difference",
    "Flash",
    "KVBudget",
    "Memory",
    "Quantity",
    "Thermal",
    "diff",
    "kv_budget",
    "load",
    "load_many",
    "names",
    "user_dir",
]
