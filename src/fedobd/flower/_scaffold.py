"""Scaffold: writes a Flower App that runs a configuration."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import tomli_w

from fedobd import __version__
from fedobd._errors import UsageError
from fedobd.experiments import RunConfig, write_atomically

PACKAGE = "fedobd_app"

_SERVER = '''"""The server: its options are in config.toml and in pyproject.toml."""

from pathlib import Path

from fedobd.flower import make_server_app

app = make_server_app(Path(__file__).with_name("config.toml"))
'''

_CLIENT = '''"""The client: what a node does with each message."""

from pathlib import Path

from fedobd.flower import make_client_app

app = make_client_app(Path(__file__).with_name("config.toml"))
'''

_README = """# {name}

A Flower App of fedobd that trains by the method `{method}`. What is trained, on what and how is in
`{package}/config.toml`; what one run may change is in `pyproject.toml`, under
`[tool.flwr.app.config]`.

fedobd must be installed, in the same version, on the server and on each node.

    export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 FLWR_TELEMETRY_ENABLED=0
    flwr run . local --stream \\
        --federation-config 'num-supernodes={clients} client-resources-num-cpus=1'

A node is client number `client-id` of its node config, or else `partition-id`. A node with
`data-path` in its node config trains on that file (`.npz` with the arrays `inputs` and `targets`):

    flower-supernode ... --node-config 'client-id=0 data-path="/data/own.npz"'
"""


def write_app(folder: Path, config: RunConfig) -> None:
    """Write a Flower App into a new or empty folder.

    Args:
        folder: where to.
        config: what the app runs.

    Raises:
        UsageError: the folder holds something, or cannot be made.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{str(folder)!r} is there already and not empty; choose a new folder")
    try:
        (folder / PACKAGE).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"folder {str(folder)!r} cannot be made: {error}") from error
    name = f"fedobd-{config.method}"
    readme = _README.format(
        name=name, method=config.method, package=PACKAGE, clients=config.federation.clients
    )
    files = {
        "pyproject.toml": tomli_w.dumps(_project(name, config)),
        "README.md": readme,
        f"{PACKAGE}/__init__.py": '"""A Flower App that was written by fedobd."""\n',
        f"{PACKAGE}/server_app.py": _SERVER,
        f"{PACKAGE}/client_app.py": _CLIENT,
        f"{PACKAGE}/config.toml": config.to_toml(),
    }
    for file, text in files.items():
        write_atomically(folder / file, text.encode())


def _project(name: str, config: RunConfig) -> dict[str, object]:
    """Return what pyproject.toml says, with the keys of today's Flower."""
    return {
        "build-system": {"requires": ["hatchling"], "build-backend": "hatchling.build"},
        "project": {
            "name": name,
            "version": "1.0.0",
            "description": f"Federated training with {config.method}",
            "license": "Apache-2.0",
            "dependencies": [f"fedobd[flower]=={__version__}", f"flwr>={version('flwr')}"],
        },
        "tool": {
            "hatch": {"build": {"targets": {"wheel": {"packages": [PACKAGE]}}}},
            "flwr": {
                "app": {
                    "publisher": "fedobd",
                    "components": {
                        "serverapp": f"{PACKAGE}.server_app:app",
                        "clientapp": f"{PACKAGE}.client_app:app",
                    },
                    "config": {
                        "output": "",
                        "resume": False,
                        "set": "",
                        "round-timeout": 3600.0,
                        "join-timeout": 600.0,
                        "min-replies": 1,
                    },
                }
            },
        },
    }
