"""One environment for each peer, made from the package index under a cache folder.

A peer's own packages are installed into a virtual environment of its own. PyTorch is not installed
again where the running interpreter already has it: its packages are shared through a `.pth` file,
which Python reads after the peer's own, so that all rows run on the same PyTorch. A peer that the
running interpreter can't have (too old a Python, or a CPU build of PyTorch under torchvision)
gets another interpreter of this machine, if there is one, with PyTorch from the index.

`python benchmarks/peers/environments.py` makes them all and prints an interpreter or a reason.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("FEDOBD_BENCH_CACHE", Path.home() / ".cache" / "fedobd-bench"))
TORCH = "torch==2.13.0"
INSTALL_SECONDS = 1800


class EnvironmentMissingError(Exception):
    """A peer's environment can't be had here; the message says why."""


@dataclass(frozen=True, slots=True)
class Peer:
    """What a peer needs.

    Args:
        requirements: What pip installs beside PyTorch.
        check: A statement that works only where the peer is whole.
        script: The file of this folder that runs it.
        oldest: The first Python it can run on.
        newest: The last one, if its metadata has a limit.
    """

    requirements: tuple[str, ...]
    check: str
    script: str
    oldest: tuple[int, int] = (3, 11)
    newest: tuple[int, int] = (3, 14)


PEERS = {
    "pfl": Peer(
        ("pfl[pytorch]==0.6.0",),
        "import pfl.model.pytorch",
        "run_pfl.py",
        newest=(3, 12),
    ),
    "flower": Peer(
        ("flwr[simulation]==1.41.0",),
        "import flwr.simulation, ray",
        "run_flower.py",
    ),
    # 3.0.0 wants Python 3.14.
    "blazefl": Peer(
        ("blazefl[contrib,reproducibility]==2.0.3",),
        "import blazefl.contrib",
        "run_blazefl.py",
        oldest=(3, 12),
    ),
    # torchvision 0.28 is the one for PyTorch 2.13; the index has it only with CUDA.
    "fluke": Peer(
        ("fluke-fl==0.8.1", "torchvision==0.28.0"),
        "import fluke.algorithms.fedavg",
        "run_fluke.py",
    ),
}


def prepare(name: str) -> Path:
    """Return the interpreter of a peer's environment, made now if it isn't there.

    Args:
        name: A key of `PEERS`.

    Raises:
        EnvironmentMissingError: It can't be had on this machine.
    """
    peer = PEERS[name]
    folder = CACHE / name
    python = folder / "bin" / "python"
    if _shares_current(folder) and _works(python, peer.check):
        return python
    reasons = []
    for interpreter, version in _interpreters():
        label = ".".join(map(str, version))
        if not peer.oldest <= version <= peer.newest:
            continue
        try:
            shared = _packages_with_torch(interpreter, label)
            return _make(interpreter, folder, shared, peer)
        except EnvironmentMissingError as error:
            reasons.append(f"Python {label}: {error}")
            shutil.rmtree(folder, ignore_errors=True)
    wanted = " to ".join(".".join(map(str, version)) for version in (peer.oldest, peer.newest))
    raise EnvironmentMissingError("; ".join(reasons) or f"no Python {wanted} on this machine")


def _shares_current(folder: Path) -> bool:
    """Whether an environment's PyTorch is the running interpreter's, or of this cache."""
    for file in folder.glob("lib/python*/site-packages/shared.pth"):
        first = file.read_text().splitlines()[0]
        return first == sysconfig.get_path("purelib") or Path(first).is_relative_to(CACHE)
    return True


def _interpreters() -> Iterator[tuple[Path, tuple[int, int]]]:
    """Yield the running interpreter, then others of this machine, one a version."""
    seen = {sys.version_info[:2]}
    yield Path(sys.executable), sys.version_info[:2]
    for minor in (12, 13, 14, 11):
        version = (3, minor)
        for candidate in _candidates(f"3.{minor}"):
            if version not in seen and _works(candidate, "import venv, ensurepip"):
                seen.add(version)
                yield candidate, version


def _candidates(label: str) -> list[Path]:
    found = shutil.which(f"python{label}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    kept = sorted(pyenv.glob(f"{label}.*/bin/python{label}"))
    return [*kept, *([Path(found)] if found else [])]


def _packages_with_torch(interpreter: Path, label: str) -> list[str]:
    """Return the folders of packages, PyTorch among them, that an environment can share."""
    if str(interpreter) != sys.executable:
        base = CACHE / f"torch-{label}"
        if not _works(base / "bin" / "python", "import numpy, torch"):
            _run([str(interpreter), "-m", "venv", "--clear", str(base)])
            _pip(base / "bin" / "python", [TORCH, "numpy"])
        interpreter = base / "bin" / "python"
    if not _works(interpreter, "import torch"):
        return []
    program = "import json, sysconfig as s; print(json.dumps([s.get_path(n) for n in %r]))"
    paths = json.loads(_run([str(interpreter), "-c", program % (["purelib", "platlib"],)]))
    return list(dict.fromkeys(paths))


def _make(interpreter: Path, folder: Path, shared: list[str], peer: Peer) -> Path:
    _run([str(interpreter), "-m", "venv", "--clear", str(folder)])
    python = folder / "bin" / "python"
    if shared:
        packages = next((folder / "lib").glob("python*/site-packages"))
        (packages / "shared.pth").write_text("\n".join(shared) + "\n")
    _pip(python, [TORCH, *peer.requirements])
    _run([str(python), "-c", peer.check])
    return python


def _pip(python: Path, requirements: list[str]) -> None:
    _run([str(python), "-m", "pip", "install", "--quiet", *requirements])


def _works(python: Path, statement: str) -> bool:
    if not python.exists():
        return False
    done = subprocess.run([str(python), "-c", statement], capture_output=True, check=False)
    return done.returncode == 0


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=INSTALL_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentMissingError(str(error)) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise EnvironmentMissingError(lines[-1] if lines else f"exit code {done.returncode}")
    return done.stdout


def main() -> None:
    """Make the environments named in the arguments, or all."""
    for name in sys.argv[1:] or PEERS:
        try:
            print(name, prepare(name), flush=True)
        except EnvironmentMissingError as error:
            print(name, "is left out:", error, flush=True)


if __name__ == "__main__":
    main()
