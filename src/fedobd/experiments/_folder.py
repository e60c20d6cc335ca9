"""RunFolder: what a run leaves on disk, so that it can be read, resumed and run again.

    config.toml         complete; `fedobd run config.toml` runs it again
    environment.json    versions and machine
    schema.json         tensors and blocks of the model
    rounds.jsonl        one line a round, written as it goes
    checkpoint/         the server after the last round, and client states; none of it is pickled
    payloads/           every payload, if that was asked for
    model.safetensors   the trained model
    summary.json        written last
    run.log             what the run said
    report.html         the page of `fedobd report`
    tensorboard/, mlflow_run_id.txt     where trackers of `output.trackers` go on

A file that must be whole is written beside its place and moved there, so a kill at any moment
leaves the old or the new one. The checkpoint names the client states that belong to it by round; a
record is written before the checkpoint of its round, and records beyond the checkpoint are cut off
when a run is resumed.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import tomli_w
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from fedobd._errors import UsageError
from fedobd.blocks import ModelState
from fedobd.payload import Bytes
from fedobd.sessions import SavedSession
from fedobd.simulation import Callback
from fedobd.tracking import TRACKING_KEYS

CONFIG_FILE = "config.toml"
"""What was run, complete: it runs again."""

SCHEMA_FILE = "schema.json"
"""The model's tensors and blocks."""

SUMMARY_FILE = "summary.json"
"""The figures of a run that has ended."""

ROUNDS_FILE = "rounds.jsonl"
"""A record a round."""

MODEL_FILE = "model.safetensors"
"""The trained model."""


def write_atomically(path: Path, data: Bytes) -> None:
    """Put a whole file in its place, or leave what was there."""
    draft = path.with_name(path.name + ".part")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # else a power cut could leave the new name with no content
    draft.replace(path)


def _to_safetensors(tensors: ModelState, metadata: Mapping[str, str] | None = None) -> bytes:
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    return save(contiguous, None if metadata is None else dict(metadata))


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people and programs."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def claim_folder(path: Path, marker: str, *, resume: bool) -> None:
    """Make a folder for a new run, or check that it holds one to resume.

    Args:
        path: the folder.
        marker: the file that tells what it holds.
        resume: whether to go on with what it holds.

    Raises:
        UsageError: it is a file, holds something else, or holds a run that was not asked to be
            resumed.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"output {str(path)!r} is a file; wanted a folder")
    is_used, has_run = path.is_dir() and any(path.iterdir()), (path / marker).exists()
    if is_used and not resume:
        what = "another run" if has_run else "other files"
        raise UsageError(
            f"output folder {str(path)!r} holds {what}; choose another, or --resume to go on "
            f"with it"
        )
    if is_used and not has_run:
        raise UsageError(f"output folder {str(path)!r} holds no run to resume")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"output folder {str(path)!r} cannot be made: {error}") from error


def settle_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write a folder's configuration, or compare it with the one that is there.

    What tracks a run may change when it goes on, since results do not depend on it.

    Raises:
        UsageError: another one is there.
    """
    before = read_config(path)
    if before is None:
        write_atomically(path / CONFIG_FILE, tomli_w.dumps(config).encode())
        return
    changed = {k: v for k, v in _differences(before, config) if k not in TRACKING_KEYS}
    if changed:
        raise UsageError(
            f"the run in {str(path)!r} has another configuration and cannot be resumed: "
            + "; ".join(f"{key} {change}" for key, change in sorted(changed.items()))
        )


def read_config(path: Path) -> dict[str, Any] | None:
    """Return the configuration of what is in a folder, None before it has started.

    Raises:
        UsageError: it is damaged.
    """
    file = path / CONFIG_FILE
    if not file.exists():
        return None
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # no text, or no TOML
        raise UsageError(f"{str(file)!r} is damaged: {error}") from error


class RunFolder:
    """A run's folder.

    Args:
        path: where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._states = path / "checkpoint" / "clients"
        self._state_rounds: dict[int, int] = {}

    def start(self, config: Mapping[str, Any], *, resume: bool) -> None:
        """Claim the folder and write, or compare, the configuration.

        Args:
            config: plain values, complete; what TOML can hold.
            resume: whether to go on with the run that is there.

        Raises:
            UsageError: the folder cannot be had, or holds a run of another configuration.
        """
        claim_folder(self.path, CONFIG_FILE, resume=resume)
        settle_config(self.path, config)
        self._states.mkdir(parents=True, exist_ok=True)

    def config(self) -> dict[str, Any] | None:
        """See `read_config`."""
        return read_config(self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes of this machine from working on the run; ends with the process.

        Raises:
            UsageError: another one does.
        """
        # config.toml is there in every folder and written once, so it is always the same file.
        with (self.path / CONFIG_FILE).open("rb") as stream:
            try:
                _lock(stream.fileno())
            except BlockingIOError:
                raise UsageError(
                    f"another process works on the run in {str(self.path)!r}; wait until it has "
                    "ended, or choose another folder"
                ) from None
            yield

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended."""
        return (self.path / SUMMARY_FILE).exists()

    # --- records

    def append_record(self, record: dict[str, Any]) -> None:
        """Add a round's record."""
        with (self.path / ROUNDS_FILE).open("ab") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[dict[str, Any]]:
        """Return the records of all rounds, without a last line that was cut.

        Raises:
            UsageError: the file is damaged.
        """
        return list(_whole_lines(self.path / ROUNDS_FILE))

    def cut_records(self, rounds: int) -> None:
        """Keep the records of the first rounds, drop later ones."""
        file = self.path / ROUNDS_FILE
        if file.exists():
            lines = [_line(r) for r in _whole_lines(file) if r["round"] <= rounds]
            write_atomically(file, b"".join(lines))

    # --- checkpoint

    @property
    def _checkpoint(self) -> Path:
        return self.path / "checkpoint" / "server.safetensors"

    def save_checkpoint(self, saved: SavedSession) -> None:
        """Put the server's state after a round in place of the last checkpoint.

        The checkpoint says which client states belong to it.
        """
        metadata = {
            "session": json.dumps(saved.values),
            "client_states": json.dumps(self._state_rounds),
        }
        write_atomically(self._checkpoint, _to_safetensors(saved.tensors, metadata))
        self._drop_stale_states()  # only now: a kill before it must find the older ones

    def load_checkpoint(self) -> SavedSession | None:
        """Return the last checkpoint, None before the first.

        Raises:
            UsageError: the file is damaged.
        """
        if not self._checkpoint.exists():
            return None
        try:
            with safe_open(self._checkpoint, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            values = json.loads(metadata["session"])
            rounds = json.loads(metadata["client_states"])
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise UsageError(
                f"checkpoint {str(self._checkpoint)!r} is damaged: {error}"
            ) from error
        self._state_rounds = {int(client): number for client, number in rounds.items()}
        self._drop_stale_states()
        return SavedSession(tensors, values)

    def _state_file(self, client: int, round_number: int) -> Path:
        return self._states / f"{client}@{round_number}.safetensors"

    def _drop_stale_states(self) -> None:
        current = {self._state_file(c, r) for c, r in self._state_rounds.items()}
        for file in self._states.iterdir():
            if file not in current:
                file.unlink()

    def load(self, client: int) -> ModelState | None:
        """Return what a client kept, None if it has nothing.

        With `store` this is the engine's `ClientStates`.
        """
        if client not in self._state_rounds:
            return None
        return dict(load_file(self._state_file(client, self._state_rounds[client])))

    def store(self, client: int, round_number: int, state: ModelState) -> None:
        """Keep a client's state after a round; it counts from the next checkpoint on."""
        write_atomically(self._state_file(client, round_number), _to_safetensors(state))
        self._state_rounds[client] = round_number

    # --- results

    def write_model(self, state: ModelState) -> None:
        """Write the trained model."""
        write_atomically(self.path / MODEL_FILE, _to_safetensors(state, {"format": "pt"}))

    def write_json(self, name: str, value: Any) -> None:
        """Write one of the folder's JSON files."""
        write_json(self.path / name, value)

    def read_json(self, name: str) -> Any:
        """Read one of the folder's JSON files.

        Raises:
            UsageError: the file is damaged.
        """
        file = self.path / name
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{str(file)!r} is damaged: {error}") from error


@final
class PayloadFiles(Callback):
    """Keeps every payload of a run as a file in its folder.

    Args:
        folder: the run's folder.
    """

    wants_payloads = True

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder.path / "payloads"

    def on_payload(self, round_number: int, name: str, payload: Bytes) -> None:
        """See `Callback.on_payload`."""
        folder = self._folder / f"round-{round_number:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{name}.fobd", payload)


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _whole_lines(file: Path) -> Iterator[dict[str, Any]]:
    if file.exists():
        for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
            if line.endswith(b"\n"):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise UsageError(
                        f"{str(file)!r}, line {number}, is damaged: {error}"
                    ) from error


def _lock(file: int) -> None:
    """Lock a file until it is closed; raises BlockingIOError where another process has."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return


def _differences(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted keys whose values differ, and how."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() | after.keys():
            place = f"{path}.{key}" if path else str(key)
            yield from _differences(before.get(key), after.get(key), place)
    elif before != after:
        yield path, f"was {_shown(before)}, is {_shown(after)}"


def _shown(value: Any) -> str:
    return "nothing" if value is None else "a table" if isinstance(value, dict) else repr(value)
