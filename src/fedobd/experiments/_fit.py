"""Fit: whether a model can be trained on a data set, found out before a run leaves traces."""

from __future__ import annotations

import torch
from torch import nn

from fedobd._errors import UsageError, describe
from fedobd.experiments._config import RunConfig
from fedobd.experiments._data import BuiltData
from fedobd.training import Loss, binary_cross_entropy, cross_entropy


def check_fit(config: RunConfig, built: BuiltData, model: nn.Module, loss: Loss) -> None:
    """Try a model on two training examples, before a run leaves traces.

    Raises:
        UsageError: it cannot be trained on them, or not tell all classes or tokens apart.
    """
    examples = built.federated.clients[0].train
    batch = examples.take(torch.tensor([0, len(examples) - 1]))
    inputs, targets = batch.inputs, batch.targets
    kind = f"examples of shape {tuple(inputs.shape[1:])}"
    if built.vocabulary is not None:
        kind = f"texts of {inputs.shape[1]} tokens"
        _check_vocabulary(config, len(built.vocabulary), model)
        _check_padding(config, built, model)
        inputs = inputs.clone()
        inputs[0, 0] = len(built.vocabulary) - 1
    if (config.data.image.flip or config.data.image.crop_padding) and inputs.ndim != 4:
        raise UsageError(
            "data.image.flip and data.image.crop_padding are for images; data "
            f"{config.data.name!r} holds {kind}"
        )
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            outputs = model(inputs.to(device))
            _check_classes(config, built, outputs, loss)
            float(loss(outputs, targets.to(device)))
    except UsageError:
        raise
    except Exception as error:  # of any kind, since models and losses may be the user's own
        raise UsageError(
            f"model {config.model.name!r} does not fit data {config.data.name!r}, {kind}: "
            f"{describe(error)}"
        ) from error


def _check_vocabulary(config: RunConfig, num_tokens: int, model: nn.Module) -> None:
    known = getattr(model, "vocab_size", None)
    if isinstance(known, int) and known < num_tokens:
        raise UsageError(
            f"model {config.model.name!r} has a vocab_size of {known}, and the texts of data "
            f"{config.data.name!r} have {num_tokens} different tokens; set vocab_size in "
            "model.options, or data.text.tokenizer to the model's own"
        )


def _check_padding(config: RunConfig, built: BuiltData, model: nn.Module) -> None:
    known = getattr(model, "padding", built.padding)
    if known != built.padding:
        raise UsageError(
            f"model {config.model.name!r} takes token {known} for padding, and the texts of data "
            f"{config.data.name!r} are padded with token {built.padding}; set data.text.tokenizer "
            "to the model's own, or pad_token_id in model.options.config"
        )


def _check_classes(config: RunConfig, built: BuiltData, outputs: torch.Tensor, loss: Loss) -> None:
    if built.classes is None or loss not in (cross_entropy, binary_cross_entropy):
        return
    known = 2 if loss is binary_cross_entropy else outputs.shape[1]
    if known < len(built.classes):
        remedy = f"model.options.{'num_classes' if built.vocabulary is None else 'num_outputs'}"
        if loss is binary_cross_entropy:
            remedy += " and training.loss to 'cross-entropy'"
        raise UsageError(
            f"model {config.model.name!r} with loss {config.training.loss!r} tells {known} "
            f"classes apart; data {config.data.name!r} has {len(built.classes)} classes: "
            f"set {remedy}"
        )
