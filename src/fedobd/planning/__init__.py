"""Plans: what a federation of a model will send, before anything is trained."""

from __future__ import annotations

from fedobd.planning._method_plan import Federation, MethodPlan, StagePlan, plan_method
from fedobd.planning._plan import Plan, make_plan
from fedobd.planning._updates import FINE_TUNING_UPDATE_SIZE, TYPICAL_UPDATE_SIZE, UpdateModel

__all__ = [
    "FINE_TUNING_UPDATE_SIZE",
    "TYPICAL_UPDATE_SIZE",
    "Federation",
    "MethodPlan",
    "Plan",
    "StagePlan",
    "UpdateModel",
    "make_plan",
    "plan_method",
]
