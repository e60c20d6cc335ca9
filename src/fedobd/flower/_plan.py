"""A round's plan as entries of the config that a train function gets."""

from __future__ import annotations

from typing import Any

from flwr.app import ConfigRecord

from fedobd._errors import UsageError
from fedobd.sessions import RoundPlan

_KEYS = {
    "round": "server-round",
    "stage": "stage",
    "epochs": "epochs",
    "schedule_start": "schedule-start",
    "schedule_epochs": "schedule-epochs",
    "run_start": "run-start",
    "run_epochs": "run-epochs",
}


def plan_config(plan: RoundPlan) -> dict[str, Any]:
    """Return the entries that tell a client of the round; `server-round` is Flower's own name."""
    return {key: getattr(plan, name) for name, key in _KEYS.items()}


def read_plan(config: ConfigRecord, client: int) -> RoundPlan:
    """Return the plan that a config tells of, with this client as the cohort.

    Raises:
        UsageError: an entry lacks or is no whole number.
    """
    values: dict[str, int] = {}
    for name, key in _KEYS.items():
        value = config.get(key)
        if not isinstance(value, int):
            raise UsageError(f"the config of the message has {key} = {value!r}; wanted a number")
        values[name] = value
    return RoundPlan(cohort=(client,), **values)
