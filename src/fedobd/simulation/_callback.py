"""Callback: sees a run as it goes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

from fedobd.payload import Bytes
from fedobd.sessions import RoundPlan


class Callback:
    """Sees a run as it goes; override what is of interest, the rest does nothing.

    No result depends on a callback. A run that goes on, or has ended before, shows the rounds that
    lie behind it first, so that a callback needs no state of its own on disk.
    """

    wants_payloads: bool = False
    """Whether `on_payload` is called; uploads then come to the main process as they are."""

    def on_run_begin(self, config: Any, planned_rounds: int, folder: Path) -> None:
        """A run begins or goes on.

        Args:
            config: the run's `fedobd.experiments.RunConfig`.
            planned_rounds: how many rounds it has at most.
            folder: its run folder.
        """

    def on_payload(self, round_number: int, name: str, payload: Bytes) -> None:
        """A payload was sent or has come.

        Args:
            round_number: the round.
            name: which one, such as `broadcast` or `upload-3`.
            payload: its bytes.
        """

    def on_client_end(self, plan: RoundPlan, done: int) -> None:
        """A client of the round has uploaded.

        Args:
            plan: the round's plan.
            done: how many clients have, those included whose uploads were refused.
        """

    def on_round_end(self, record: dict[str, Any]) -> None:
        """A round has ended, or was read from the run folder.

        Args:
            record: the round's line of rounds.jsonl.
        """

    def on_run_end(self, summary: Any) -> None:
        """The run has ended.

        Args:
            summary: what came of it, a `fedobd.experiments.Summary`.
        """


@final
class Callbacks(Callback):
    """Several callbacks as one, called in their order.

    Args:
        members: the callbacks.
    """

    def __init__(self, members: Iterable[Callback]) -> None:
        self._members = tuple(members)
        self.wants_payloads = any(member.wants_payloads for member in self._members)

    def on_run_begin(self, config: Any, planned_rounds: int, folder: Path) -> None:
        """See `Callback.on_run_begin`."""
        for member in self._members:
            member.on_run_begin(config, planned_rounds, folder)

    def on_payload(self, round_number: int, name: str, payload: Bytes) -> None:
        """See `Callback.on_payload`; only for members that want payloads."""
        for member in self._members:
            if member.wants_payloads:
                member.on_payload(round_number, name, payload)

    def on_client_end(self, plan: RoundPlan, done: int) -> None:
        """See `Callback.on_client_end`."""
        for member in self._members:
            member.on_client_end(plan, done)

    def on_round_end(self, record: dict[str, Any]) -> None:
        """See `Callback.on_round_end`."""
        for member in self._members:
            member.on_round_end(record)

    def on_run_end(self, summary: Any) -> None:
        """See `Callback.on_run_end`."""
        for member in self._members:
            member.on_run_end(summary)
