"""What a model with a context would do on a device: fit, speed, flash traffic. Needs no weights and no engine."""

from .advice import advise
from .model import PlannedModel, read_model
from .planner import Plan, Workload, make_plan

__all__ = ["Plan", "PlannedModel", "Workload", "advise", "make_plan", "read_model"]
