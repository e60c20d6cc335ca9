"""What several models do alike: checks of their options, and where the tokens of texts are."""

from __future__ import annotations

import torch

from fedobd._errors import UsageError


def check_counts(model: str, **counts: int) -> None:
    """Raise UsageError where an option of a model is no integer of at least 1."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{model}: {name} is {value!r}; wanted an integer of at least 1")


def check_tokens(model: str, tokens: torch.Tensor, max_length: int | None) -> None:
    """Raise UsageError unless integer tokens have shape (n, length), 1 <= length <= max_length."""
    if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= (max_length or tokens.shape[1]):
        limit = "" if max_length is None else f" <= max_length = {max_length}"
        raise UsageError(
            f"{model}: tokens have shape {tuple(tokens.shape)}; wanted (n, length) with "
            f"1 <= length{limit}"
        )


def attended(tokens: torch.Tensor, padding: int) -> torch.Tensor:
    """Return where attention may look: at every token that is not padding.

    A text of padding alone looks at its first place, as the softmax over no place is 0/0.

    Args:
        tokens: token ids, int64, shape (n, length).
        padding: the token id that stands for no token.

    Returns:
        bool, shape (n, length); each row has a True.
    """
    real = tokens != padding
    place = torch.arange(tokens.shape[1], device=tokens.device)
    return real | ((place == 0) & ~real.any(dim=1, keepdim=True))
