"""Flower: compressed payloads for its apps, and whole methods over its deployment.

Needs the extra `fedobd[flower]`; the rest of the package does not import it.
"""

from __future__ import annotations

from fedobd.flower._app import make_client_app, make_server_app, write_app
from fedobd.flower._grid import CodecGrid, Traffic
from fedobd.flower._launch import run_in_simulation
from fedobd.flower._metrics import MetricKeys
from fedobd.flower._mod import CompressionMod
from fedobd.flower._strategy import FedOBDStrategy

__all__ = [
    "CodecGrid",
    "CompressionMod",
    "FedOBDStrategy",
    "MetricKeys",
    "Traffic",
    "make_client_app",
    "make_server_app",
    "run_in_simulation",
    "write_app",
]
