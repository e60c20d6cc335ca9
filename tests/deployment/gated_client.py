"""The client of a test app: the product's, which waits before it trains while it is told to.

A test steers it by files in the folder `gate` of the node config: client C waits in round R as
long as `hold-C-R` is there, and says so by `waits-C-R`.
"""

from __future__ import annotations

import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedobd.flower import make_client_app

LOOK_SECONDS = 0.1


class GatedClient(ClientApp):
    """Hands each message on to another app, when the gate is open."""

    def __init__(self, inner: ClientApp) -> None:
        super().__init__()
        self._inner = inner

    def __call__(self, message: Message, context: Context) -> Message:
        gate = Path(str(context.node_config["gate"]))
        place = f"{context.node_config['client-id']}-{message.metadata.group_id}"
        if (hold := gate / f"hold-{place}").exists():
            (gate / f"waits-{place}").touch()
            while hold.exists():
                time.sleep(LOOK_SECONDS)
        return self._inner(message, context)


app = GatedClient(make_client_app(Path(__file__).with_name("config.toml")))
