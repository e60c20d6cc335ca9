"""Sessions: the two ends of a run, without input or output, and what a method decides for them."""

from __future__ import annotations

from fedobd.sessions._aggregation import Sums
from fedobd.sessions._client import Broadcast, ClientSession, encode_uploads
from fedobd.sessions._intake import Intake, IntakeTerms, check_addressed
from fedobd.sessions._method import Memory, Method, Shipment, UplinkContext, all_blocks
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

__all__ = [
    "MAX_EXAMPLES",
    "Broadcast",
    "ClientSession",
    "EarlyStop",
    "Intake",
    "IntakeTerms",
    "Memory",
    "Method",
    "Refusal",
    "RoundPlan",
    "RoundRecord",
    "SavedSession",
    "ServerSession",
    "Shipment",
    "Stage",
    "Sums",
    "UplinkContext",
    "UploadRecord",
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
