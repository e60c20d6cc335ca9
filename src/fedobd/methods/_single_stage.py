"""What methods of one stage share: like rounds, and a rule to end them early."""

from __future__ import annotations

from dataclasses import dataclass

from fedobd.sessions import EarlyStop, Method, Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleStage(Method):
    """Base of the methods whose rounds are all alike.

    Args:
        rounds: number of rounds, from 1.
        epochs: local epochs of each round, from 1.
        cohort: count (int) or fraction (float) of the clients in each round.
        stop: the rule by which the run ends early.
        lossless: whether plain values are compressed, without loss; the papers send them as they
            are.
    """

    rounds: int = 100
    epochs: int = 5
    cohort: int | float = 0.5
    stop: EarlyStop = EarlyStop()
    lossless: bool = False

    def __post_init__(self) -> None:
        self.stages()

    def stages(self) -> tuple[Stage, ...]:
        """See `Method.stages`."""
        return (Stage(number=1, rounds=self.rounds, epochs=self.epochs, cohort=self.cohort),)
