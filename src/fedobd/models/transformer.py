"""TransformerClassifier: a Transformer encoder over token ids with a linear classifier.

References:
    Ashish Vaswani, Noam Shazeer, Niki Parmar, Jakob Uszkoreit, Llion Jones, Aidan N. Gomez, Lukasz
    Kaiser, Illia Polosukhin. Attention Is All You Need. NeurIPS 2017, arXiv 1706.03762, sections
    3.1 and 3.5.
    Jeffrey Pennington, Richard Socher, Christopher D. Manning. GloVe: Global Vectors for Word
    Representation. EMNLP 2014, doi 10.3115/v1/D14-1162 (vectors of the published settings).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from fedobd._errors import UsageError
from fedobd.models._checks import attended, check_counts, check_tokens

PADDING = 0
"""The token id that stands for no token."""


class TransformerClassifier(nn.Module):
    """Text classifier: embedding, sinusoidal positions, encoder layers, mean over the tokens.

    The defaults are the published settings for IMDB, with 452,548 parameters in each encoder
    layer.

    Args:
        vocab_size: number of token ids, padding included.
        d_model: width of the embedding and of the encoder layers.
        num_layers: number of encoder layers.
        nhead: attention heads; d_model must be a multiple.
        dim_feedforward: width of the feed-forward networks.
        dropout: dropout rate, on the embedded tokens and in the encoder layers.
        num_outputs: logits a text; 1 is for two classes.
        max_length: tokens of the longest text that is accepted.
        frozen_embedding: whether the embedding keeps its values in training.
        vectors: values for the embedding, float, shape (vocab_size, d_model); None for random
            ones.

    Raises:
        UsageError: an option is outside what is allowed, or the vectors have another shape.

    Departs from the paper:
        The embedding is not multiplied by sqrt(d_model), as word vectors have a scale of their
        own.

    Example:
        >>> model = TransformerClassifier(vocab_size=20, d_model=8, nhead=2, dim_feedforward=16)
        >>> model(torch.tensor([[3, 7, 2], [5, 0, 0]])).shape
        torch.Size([2, 1])
    """

    positions: torch.Tensor

    def __init__(
        self,
        vocab_size: int,
        *,
        d_model: int = 100,
        num_layers: int = 2,
        nhead: int = 5,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        num_outputs: int = 1,
        max_length: int = 300,
        frozen_embedding: bool = False,
        vectors: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        check_counts(
            "TransformerClassifier",
            vocab_size=vocab_size,
            d_model=d_model,
            num_layers=num_layers,
            nhead=nhead,
            dim_feedforward=dim_feedforward,
            num_outputs=num_outputs,
            max_length=max_length,
        )
        if isinstance(dropout, bool) or not (
            isinstance(dropout, int | float) and 0 <= dropout < 1
        ):
            raise UsageError(
                f"TransformerClassifier: dropout is {dropout!r}; allowed are 0 <= dropout < 1"
            )
        if d_model % nhead:
            raise UsageError(
                f"TransformerClassifier: d_model is {d_model} and nhead {nhead}; d_model must be "
                "a multiple of nhead"
            )
        self.vocab_size, self.padding = vocab_size, PADDING
        self.embedding = nn.Embedding(vocab_size, d_model, padding_idx=PADDING)
        if vectors is not None:
            self._set_vectors(vectors)
        self.embedding.weight.requires_grad_(not frozen_embedding)
        self.register_buffer("positions", _sinusoids(max_length, d_model), persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(d_model, nhead, dim_feedforward, dropout, batch_first=True)
            for _ in range(num_layers)
        )
        self.classifier = nn.Linear(d_model, num_outputs)

    def _set_vectors(self, vectors: torch.Tensor) -> None:
        weight, fault = self.embedding.weight, None
        if vectors.shape != weight.shape:
            wanted = f"(vocab_size, d_model) = {tuple(weight.shape)}"
            fault = f"shape {tuple(vectors.shape)}; wanted {wanted}"
        elif not vectors.is_floating_point():
            fault = f"element type {vectors.dtype}; wanted a float"
        if fault is not None:
            raise UsageError(f"TransformerClassifier: vectors have {fault}")
        with torch.no_grad():
            weight.copy_(vectors)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits, float, shape (n, num_outputs).

        Args:
            tokens: token ids, int64, shape (n, length) with 1 <= length <= max_length; 0 is
                padding, and may stand anywhere. A text of padding alone gets the classifier's
                bias.

        Raises:
            UsageError: the tokens have another shape, or are longer than max_length.
        """
        check_tokens("TransformerClassifier", tokens, len(self.positions))
        ignored = ~attended(tokens, PADDING)
        hidden = self.dropout(self.embedding(tokens) + self.positions[: tokens.shape[1]])
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=ignored)
        # Padding is set to 0 rather than multiplied by 0: its values are arbitrary, even infinite.
        real = tokens != PADDING
        total = hidden.masked_fill(~real.unsqueeze(-1), 0.0).sum(dim=1)
        mean = total / real.sum(dim=1, keepdim=True).clamp(min=1)
        logits: torch.Tensor = self.classifier(mean)
        return logits


def _sinusoids(length: int, width: int) -> torch.Tensor:
    """Return the fixed positions of Vaswani et al., section 3.5: shape (length, width)."""
    place = torch.arange(length, dtype=torch.float64).unsqueeze(1)
    even = torch.arange(0, width, 2, dtype=torch.float64)
    angle = place * torch.exp(even * (-math.log(10000.0) / width))
    table = torch.empty(length, width, dtype=torch.float64)
    table[:, 0::2] = torch.sin(angle)
    table[:, 1::2] = torch.cos(angle[:, : width // 2])
    return table.to(torch.float32)
