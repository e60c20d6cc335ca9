"""Classifiers of Hugging Face transformers, new or pretrained, trained whole or through LoRA.

Rules kept here:
- transformers and peft are imported when a model is built, never before;
- nothing is downloaded: a model comes from a configuration or from a folder on this machine;
- weights are read in the safetensors format only, and no code that comes with them is run;
- parameters are float32, whatever their type in the folder.

References:
    Thomas Wolf et al. Transformers: State-of-the-Art Natural Language Processing. EMNLP 2020
    (System Demonstrations), arXiv 1910.03771.
    Edward J. Hu, Yelong Shen, Phillip Wallis, Zeyuan Allen-Zhu, Yuanzhi Li, Shean Wang, Lu Wang,
    Weizhu Chen. LoRA: Low-Rank Adaptation of Large Language Models. ICLR 2022, arXiv 2106.09685,
    section 4.1.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fedobd._errors import UsageError, describe
from fedobd._lookup import checkpoint_folder, nearest
from fedobd.models._checks import attended, check_counts, check_tokens

_NOT_A_SIZE = ("auto_map", "id2label", "label2id", "num_labels", "quantization_config")
"""Keys of a configuration that are set here, or would bring foreign code or kernels."""

_AUTO_CLASSES = {
    "HuggingFaceText": "AutoModelForSequenceClassification",
    "HuggingFaceImage": "AutoModelForImageClassification",
}
"""Class of transformers that chooses the network of each model here."""

_ALL_SEE_ALL = ("albert", "bert", "distilbert", "electra", "roberta", "xlm-roberta")
"""Types whose tokens attend to all tokens, in every layer; each is compared under vmap in the
tests. A mask of four dimensions says so in full, and would be wrong for causal or local layers."""


class HuggingFaceText(nn.Module):
    """A text classifier of transformers: its `AutoModelForSequenceClassification`.

    Any encoder or decoder with such a class works: BERT, ALBERT, DistilBERT, RoBERTa, GPT-2 ...
    With transformers 5, BERT and its kin can be computed under `torch.func.vmap`, as stacked
    training does.

    Args:
        num_outputs: logits a text; 1 is for two classes.
        config: `model_type` and any sizes of a new model, as in its `config.json`.
        checkpoint: folder of a pretrained model, or `package:name`; see `checkpoint_folder`. A
            classifier that it lacks, or has for another number of outputs, is made anew.
        lora: options of `peft.LoraConfig`, such as `{"r": 8, "target_modules": ["query"]}`; the
            model's own weights are then frozen, and the adapters and the classifier trained. None
            for training everything.
        max_length: tokens of the longest text that is accepted; None for as many as the model
            has positions for.

    Raises:
        UsageError: transformers or peft is not installed; not exactly one of `config` and
            `checkpoint` is given; or an option is refused by the library.

    Example:
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> bert = {"model_type": "bert", "vocab_size": 20, "intermediate_size": 16, **sizes}
        >>> model = HuggingFaceText(config=bert)
        >>> model(torch.tensor([[3, 7, 2], [5, 0, 0]])).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        num_outputs: int = 1,
        *,
        config: Mapping[str, Any] | None = None,
        checkpoint: str | None = None,
        lora: Mapping[str, Any] | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        check_counts("HuggingFaceText", num_outputs=num_outputs)
        self.network = _make_network("HuggingFaceText", num_outputs, config, checkpoint, lora)
        longest = _longest_text(self.network)
        if max_length is not None:
            check_counts("HuggingFaceText", max_length=max_length)
            if longest is not None and max_length > longest:
                raise UsageError(
                    f"HuggingFaceText: max_length is {max_length}; the model has positions for "
                    f"{longest} tokens"
                )
            longest = max_length
        self.max_length = longest
        self.padding: int = self.network.config.pad_token_id
        self.vocab_size: int | None = getattr(self.network.config, "vocab_size", None)
        takes = inspect.signature(type(self.network).forward).parameters
        self._takes_mask = "attention_mask" in takes
        is_decoder = getattr(self.network.config, "is_decoder", False)
        self._all_see_all = self.network.config.model_type in _ALL_SEE_ALL and not is_decoder

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits, float32, shape (n, num_outputs).

        Args:
            tokens: token ids, int64, shape (n, length) with 1 <= length <= max_length; the
                `pad_token_id` of the model's configuration, 0 where it has none, is padding. A
                text of padding alone counts as one such token.

        Raises:
            UsageError: the tokens have another shape, or are longer than max_length.
        """
        check_tokens("HuggingFaceText", tokens, self.max_length)
        inputs = {"input_ids": tokens}
        if self._takes_mask:
            inputs["attention_mask"] = self._mask_of(tokens)
        logits: torch.Tensor = self.network(**inputs).logits
        return logits

    def _mask_of(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = attended(tokens, self.padding)
        if self._all_see_all and _is_batched(tokens):
            # Under vmap, a mask of two dimensions fails: transformers asks whether it is all ones.
            ignored = ~mask[:, None, None, :]
            lowest = torch.finfo(torch.float32).min
            return torch.zeros(ignored.shape, device=tokens.device).masked_fill(ignored, lowest)
        return mask.to(torch.int64)


class HuggingFaceImage(nn.Module):
    """An image classifier of transformers: its `AutoModelForImageClassification`.

    Any model with such a class works: ViT, DeiT, Swin, ConvNeXt, ResNet ...

    Args:
        num_classes: number of classes, one logit each.
        config: as for `HuggingFaceText`, and so are `checkpoint` and `lora`.
        checkpoint: see `config`.
        lora: see `config`.

    Raises:
        UsageError: as for `HuggingFaceText`.

    Example:
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> vit = {"model_type": "vit", "image_size": 8, "patch_size": 4, **sizes}
        >>> HuggingFaceImage(config=vit | {"intermediate_size": 16})(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        config: Mapping[str, Any] | None = None,
        checkpoint: str | None = None,
        lora: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_counts("HuggingFaceImage", num_classes=num_classes)
        self.network = _make_network("HuggingFaceImage", num_classes, config, checkpoint, lora)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits, float32, shape (n, num_classes).

        Args:
            images: float, shape (n, channels, height, width), with the channels and sides of the
                model's configuration.

        Raises:
            UsageError: the images have a shape that the model does not take.
        """
        if images.ndim != 4:
            raise UsageError(
                f"HuggingFaceImage: images have shape {tuple(images.shape)}; wanted "
                "(n, channels, height, width)"
            )
        try:
            logits: torch.Tensor = self.network(pixel_values=images).logits
        except ValueError as error:
            raise UsageError(
                f"HuggingFaceImage: images of shape {tuple(images.shape)} were refused: {error}"
            ) from error
        return logits


def _make_network(
    model: str,
    num_labels: int,
    config: Mapping[str, Any] | None,
    checkpoint: str | None,
    lora: Mapping[str, Any] | None,
) -> Any:
    """Make a classifier of transformers; what is wrong is said with the name of our `model`."""
    if (config is None) == (checkpoint is None):
        given = "neither" if config is None else "both"
        raise UsageError(f"{model}: {given} of config and checkpoint given; wanted exactly one")
    try:
        transformers = _library("transformers")
        auto = getattr(transformers, _AUTO_CLASSES[model])
        with _quiet(transformers):
            if checkpoint is None:
                settings = _configured(transformers, config)
                _finish_config(settings, num_labels)
                with _explained(settings.model_type):
                    network = auto.from_config(settings, trust_remote_code=False)
                fresh = set[str]()
            else:
                network, fresh = _pretrained(transformers, auto, checkpoint, num_labels)
            network.float()
            if lora is not None:
                _add_lora(network, lora, fresh)
    except UsageError as error:
        raise UsageError(f"{model}: {error}") from error
    network.train()
    return network


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        message = f"{name} cannot be imported ({error}); pip install 'fedobd[hf]'"
        raise UsageError(message) from error


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Say what a library refuses; it raises exceptions of many kinds, some over many lines."""
    try:
        yield
    except Exception as error:
        if "Unrecognized configuration class" in str(error):
            raise UsageError(
                f"transformers has no classifier of this kind with model_type {what!r}"
            ) from error
        raise UsageError(f"{what} was refused: {describe(error)}") from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers from reporting what is meant to be: new classifiers, progress."""
    logging = transformers.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _configured(transformers: Any, config: Mapping[str, Any] | None) -> Any:
    """Make a configuration of plain values; transformers itself takes any key in silence."""
    if not isinstance(config, Mapping) or not isinstance(config.get("model_type"), str):
        raise UsageError(
            f"config is {config!r}; wanted a table with model_type, as {{'model_type': 'bert'}}"
        )
    sizes = {key: value for key, value in config.items() if key != "model_type"}
    model_type, types = config["model_type"], transformers.CONFIG_MAPPING
    if model_type not in types:
        raise UsageError(
            f"transformers {transformers.__version__} has no model_type {model_type!r}"
            f"{nearest(model_type, types.keys())}"
        )
    try:
        default = types[model_type]()
    except Exception:  # some configurations have no default
        default = None
    for key in sizes:
        if key in _NOT_A_SIZE:
            raise UsageError(f"config has {key!r}, which is not to be set here")
        if default is not None and not hasattr(default, key):
            hint = nearest(key, default.to_dict())
            raise UsageError(f"a {model_type} configuration has no {key!r}{hint}")
    with _explained("config"):
        return types[model_type](**sizes)


def _finish_config(config: Any, num_labels: int) -> None:
    """Set what follows from the options of this module."""
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(f"{config.model_type!r} is an encoder with a decoder; wanted one of them")
    config.num_labels = num_labels
    if getattr(config, "architectures", None) is None:
        config.architectures = []  # where a type has two classifiers, the library iterates over it
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    if getattr(config, "use_cache", False):
        config.use_cache = False  # of decoders that write; it costs memory here


def _pretrained(
    transformers: Any, auto: Any, checkpoint: str, num_labels: int
) -> tuple[Any, set[str]]:
    """Load a model; return it with the names of the parameters that its folder did not have."""
    folder = str(checkpoint_folder(checkpoint))
    local = {"local_files_only": True, "trust_remote_code": False}
    with _explained(f"checkpoint {checkpoint!r} has a config.json that"):
        config = transformers.AutoConfig.from_pretrained(folder, **local)
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(f"checkpoint {checkpoint!r} is quantized; wanted floating-point weights")
    _finish_config(config, num_labels)
    with _explained(config.model_type):
        network, loading = auto.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # of a classifier; others are refused below
            output_loading_info=True,
            **local,
        )
    body, names = f"{network.base_model_prefix}.", dict(network.named_parameters())
    fresh = set(loading["missing_keys"]) | {entry[0] for entry in loading["mismatched_keys"]}
    # Before transformers 5, names lack the prefix where the folder holds a model without a head.
    fresh = {name if name in names else body + name for name in fresh}
    # Models trained without a classifier lack the pooler as well, which serves it alone.
    lost = sorted(n for n in fresh if n.startswith(body) and "pooler" not in n)
    if lost:
        raise UsageError(
            f"checkpoint {checkpoint!r} lacks {len(lost)} tensors of the model "
            f"that its config.json describes, or has them in another shape: {lost[0]}"
            + (" ..." if len(lost) > 1 else "")
        )
    return network, fresh


def _add_lora(network: Any, lora: Mapping[str, Any], fresh: set[str]) -> None:
    """Add adapters within the model; its frozen weights keep their places in the module tree."""
    if not isinstance(lora, Mapping):
        raise UsageError(f"lora is {lora!r}; wanted a table of options of peft.LoraConfig")
    for key in ("modules_to_save", "task_type"):
        if key in lora:
            raise UsageError(
                f"lora has {key!r}, which is not to be set: the classifier is trained, the rest "
                "of the model is not"
            )
    peft = _library("peft")
    body = getattr(network, network.base_model_prefix, None)
    if not isinstance(body, nn.Module):
        raise UsageError(
            f"lora needs a model that can be told from its classifier; "
            f"{network.config.model_type!r} has no {network.base_model_prefix!r}"
        )
    untaught = [p for name, p in network.named_parameters() if name in fresh]
    with _explained("lora"):
        peft.inject_adapter_in_model(peft.LoraConfig(**lora), body)
    for parameter in untaught:  # such as a pooler's
        parameter.requires_grad_(True)


def _longest_text(network: Any) -> int | None:
    """Return how many tokens a model has positions for; None where there is no limit."""
    longest = [getattr(network.config, "max_position_embeddings", None)]
    for name, module in network.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            # RoBERTa and its kin count positions from the one after that of padding.
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            longest.append(module.num_embeddings - offset)
    return min((n for n in longest if isinstance(n, int) and n > 0), default=None)


def _is_batched(tensor: torch.Tensor) -> bool:
    """Whether a tensor is seen through `torch.func.vmap`, at any depth of transformations."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False
