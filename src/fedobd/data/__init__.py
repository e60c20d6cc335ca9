"""Data: examples as tensors, shared out among clients."""

from __future__ import annotations

from fedobd.data._arrays import load_arrays, load_digits
from fedobd.data._check import SplitReport, check_split
from fedobd.data._examples import (
    ClientData,
    Examples,
    ExampleSet,
    FederatedData,
    Prepare,
    Selection,
    gather,
    select,
    take_together,
)
from fedobd.data._images import Augmentation, ImageOptions, Normalization
from fedobd.data._load import LoadedData, draw_numbers, load_data
from fedobd.data._partition import (
    PartitionOptions,
    federate,
    hold_out,
    partition,
    partition_iid,
    set_aside,
    share_out,
)
from fedobd.data._source import Columns, Source, Splits, open_source
from fedobd.data._store import StoredExamples, move_to
from fedobd.data._text import TextOptions
from fedobd.data._vectors import load_vectors

__all__ = [
    "Augmentation",
    "ClientData",
    "Columns",
    "ExampleSet",
    "Examples",
    "FederatedData",
    "ImageOptions",
    "LoadedData",
    "Normalization",
    "PartitionOptions",
    "Prepare",
    "Selection",
    "Source",
    "SplitReport",
    "Splits",
    "StoredExamples",
    "TextOptions",
    "check_split",
    "draw_numbers",
    "federate",
    "gather",
    "hold_out",
    "load_arrays",
    "load_data",
    "load_digits",
    "load_vectors",
    "move_to",
    "open_source",
    "partition",
    "partition_iid",
    "select",
    "set_aside",
    "share_out",
    "take_together",
]
