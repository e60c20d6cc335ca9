"""Sessions: the two ends of a run, without input or output, and what a method decides for them."""

from __future__ import annotations

from fedobd.sessions._aggregator import Aggregator, UploadRules, check_addressed
from fedobd.sessions._client import Broadcast, ClientSession
from fedobd.sessions._mean import Sums
from fedobd.sessions._method import Memory, Method, TransferSpec, UplinkContext, all_blocks
from fedobd.sessions._rounds import (
    EarlyStop,
    Refusal,
    RoundPlan,
    RoundRecord,
    Stage,
    UploadRecord,
    cohort_size,
    sample_cohort,
    weighted_mean,
)
from fedobd.sessions._selection import (
    fill_budget,
    order_by_difference,
    oversized_blocks,
    parameter_budget,
    random_order,
)
from fedobd.sessions._server import MAX_EXAMPLES, SavedSession, ServerSession
from fedobd.sessions._upload import Received, encode_uploads

__all__ = [
    "MAX_EXAMPLES",
    "Aggregator",
    "Broadcast",
    "ClientSession",
    "EarlyStop",
    "Memory",
    "Method",
    "Received",
    "Refusal",
    "RoundPlan",
    "RoundRecord",
    "SavedSession",
    "ServerSession",
    "Stage",
    "Sums",
    "TransferSpec",
    "UplinkContext",
    "UploadRecord",
    "UploadRules",
    "all_blocks",
    "check_addressed",
    "cohort_size",
    "encode_uploads",
    "fill_budget",
    "order_by_difference",
    "oversized_blocks",
    "parameter_budget",
    "random_order",
    "sample_cohort",
    "weighted_mean",
]
