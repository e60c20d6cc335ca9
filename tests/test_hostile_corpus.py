"""Payloads made to do harm, and golden ones that are damaged: a value or a DecodeError.

`tests/hostile/STORIES.md` says of each file what it tries and how it must end.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fedobd import DecodeError
from fedobd.blocks import ModelSchema
from fedobd.codec import NNADQ, Unquantized
from fedobd.methods import FedOBD
from fedobd.sessions import Broadcast
from tests import second_reader
from tests.golden.make import FOLDER as GOLDEN
from tests.golden.make import encode, make_header, make_schema, tensor_spec
from tests.golden.slow_coder import varint
from tests.hostile.make import FOLDER, LEGAL, hostile_cases
from tests.hostile.readers import (
    check_alike,
    read_again,
    read_in_pieces,
    read_whole,
    schemas,
)

ROOT = Path(__file__).parent.parent
STORIES = re.findall(
    r"^\| (\w+) \| (\w+) \| ([\w ]+?)( \(client\))? \| .+ \|$",
    (FOLDER / "STORIES.md").read_text(),
    re.MULTILINE,
)[1:]
CORPUS = {name: (schema, reason, bool(client)) for name, schema, reason, client in STORIES}

FOUND_BY_LENGTH = ("truncated", "trailing bytes")
"""Faults that show in pieces only when the checksum is looked for."""

MOST_BYTES = 64 << 20


def hostile(name: str) -> tuple[bytes, ModelSchema, str]:
    schema, reason, _ = CORPUS[name]
    return (FOLDER / f"{name}.bin").read_bytes(), schemas()[schema], reason


def golden(name: str) -> tuple[bytes, ModelSchema]:
    return (GOLDEN / f"{name}.bin").read_bytes(), schemas()[name]


def closed(body: bytes) -> bytes:
    """Return the bytes with their checksum behind."""
    return body + zlib.crc32(body).to_bytes(4, "little")


# --- the corpus ----------------------------------------------------------------------------------


def test_every_hostile_file_has_its_story() -> None:
    assert sorted(CORPUS) == sorted(path.stem for path in FOLDER.glob("*.bin"))
    assert len(CORPUS) >= 160
    assert all((FOLDER / f"{name}.bin").stat().st_size < 2000 for name in CORPUS)


def test_hostile_files_are_those_of_their_script() -> None:
    # those that zstandard had a hand in may differ with its version
    for name, case in hostile_cases().items():
        if not name.startswith("zstd"):
            assert (FOLDER / f"{name}.bin").read_bytes() == case.data, name


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Compile the loops before any memory is counted."""
    for name in schemas():
        read_whole(*golden(name))


@pytest.mark.parametrize("name", [name for name, (_, _, client) in CORPUS.items() if not client])
def test_hostile_payload_ends_as_its_story_says(name: str) -> None:
    data, schema, reason = hostile(name)
    wanted = None if reason == LEGAL else reason
    tracemalloc.start()
    try:
        whole = read_whole(data, schema)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert whole.reason == wanted
    assert peak < MOST_BYTES
    assert read_again(data, schema) == whole
    for size in (1, 64):
        pieces = read_in_pieces(data, schema, size)
        if wanted is None:
            assert pieces == whole
        elif reason in FOUND_BY_LENGTH:
            assert pieces.reason is not None
        else:
            assert pieces.reason == reason


def test_tiny_pieces_cost_no_more_than_their_number() -> None:
    schema = make_schema([tensor_spec("w", 100_000)], [0])
    data = encode(schema, {"w": torch.ones(100_000)}, make_header(schema), Unquantized())
    begin = time.process_time()
    assert read_in_pieces(data, schema, 1).reason is None
    assert time.process_time() - begin < 5  # of the processor, whatever runs beside


def test_many_small_segments_take_no_more_memory_than_one() -> None:
    # each has a uniform table, which is one bit of the stream and 512 kB to look symbols up
    names = [f"w{number}" for number in range(200)]
    schema = make_schema([tensor_spec(name, 2) for name in names], [*range(200)])
    state = {name: torch.tensor([-1.0, 1.0]) for name in names}
    data = encode(schema, state, make_header(schema), NNADQ(1e-3))
    tracemalloc.start()
    try:
        assert read_whole(data, schema).reason is None
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", [name for name, (_, _, client) in CORPUS.items() if client])
def test_client_refuses_what_no_server_sends(name: str) -> None:
    data, schema, reason = hostile(name)
    assert read_whole(data, schema).reason is None
    for payload in (data, iter([data])):
        with pytest.raises(DecodeError) as caught:
            Broadcast.decode(payload, FedOBD(), schema)
        assert caught.value.reason == reason


# --- golden payloads, damaged --------------------------------------------------------------------

SLOW = "broadcast_two_chunks"
"""4107 values take the second reader 20 ms: of this one fewer changes are tried."""


def flips(data: bytes, changes: tuple[int, ...]) -> Iterator[bytes]:
    """Change each byte before the checksum, and make the checksum right."""
    for place in range(len(data) - 4):
        for change in changes:
            yield closed(data[:place] + bytes([data[place] ^ change]) + data[place + 1 : -4])


class Places(second_reader.Bytes):
    """Notes where varints stand."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.places: list[tuple[int, int, str]] = []

    def varint(self, where: str) -> int:
        start = self.position
        value = super().varint(where)
        self.places.append((start, self.position, where))
        return value


def with_other_numbers(data: bytes, schema: ModelSchema) -> Iterator[tuple[bytes, str]]:
    """Set each varint of codes and frames to 0, 1, the largest, and one more and less."""
    source = Places(data[:-4])
    header = second_reader.read_header(source, schema.to_json())
    second_reader.take_frames(source, schema.to_json(), header)
    for start, stop, where in source.places:
        value = second_reader.Bytes(data[start:stop]).varint(where)
        for other in {0, 1, 2**63 - 1, value + 1, max(value - 1, 0)} - {value}:
            yield closed(data[:start] + varint(other) + data[stop:-4]), where


@pytest.mark.parametrize("name", schemas())
def test_each_flipped_byte_gives_a_value_or_is_refused(name: str) -> None:
    data, schema = golden(name)
    changes = (0x80,) if name == SLOW else (0x01, 0x80)
    refused = sum(check_alike(one, schema).reason is not None for one in flips(data, changes))
    assert refused >= len(changes) * 21, "magic, version and fingerprint at the least"


@pytest.mark.parametrize("name", schemas())
def test_each_prefix_is_refused(name: str) -> None:
    data, schema = golden(name)
    for length in range(len(data)):
        for cut in (data[:length], closed(data[: min(length, len(data) - 5)])):
            assert check_alike(cut, schema).reason is not None, length


@pytest.mark.parametrize("name", schemas())
def test_other_lengths_are_refused(name: str) -> None:
    data, schema = golden(name)
    for altered, where in with_other_numbers(data, schema):
        reading = check_alike(altered, schema)
        # another number of levels can be as good, and gives other values
        assert reading.reason is not None or where == "a number of levels"


@pytest.mark.parametrize("name", schemas())
def test_added_bytes_are_refused(name: str) -> None:
    data, schema = golden(name)
    for extra in (b"\0", b"\xff" * 9, data):
        assert check_alike(data + extra, schema).reason == "checksum"
        assert check_alike(closed(data[:-4] + extra), schema).reason == "trailing bytes"


# --- once more with checked indices --------------------------------------------------------------


def test_no_loop_leaves_its_buffers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.test_hostile_corpus"]
    environment = {
        **os.environ,
        "NUMBA_BOUNDSCHECK": "1",
        "NUMBA_OPT": "1",  # compiles in half the time
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    read, _, grown = done.stdout.split()
    assert int(read) > 1500
    assert int(grown) < MOST_BYTES


def read_with_checked_indices() -> None:
    """Decode the corpus and golden payloads with flips; an IndexError passes through.

    Prints how many were read, how many refused, and by how many bytes the process grew meanwhile.
    """
    from fedobd.codec import _frequencies

    assert os.environ["NUMBA_BOUNDSCHECK"] == "1"
    for name in schemas():
        read_whole(*golden(name))
    with pytest.raises(IndexError):  # or else the checks are not there
        _frequencies.make_slots(np.array([2]), np.zeros(1, np.uint32), np.zeros(1, np.uint64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    readings = [read_whole(data, schema) for data, schema, _ in map(hostile, CORPUS)]
    for name in schemas():
        data, schema = golden(name)
        readings += [read_whole(one, schema) for one in flips(data, (0x01, 0x80))]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    refused = sum(reading.reason is not None for reading in readings)
    sys.stdout.write(f"{len(readings)} {refused} {grown}\n")


if __name__ == "__main__":
    read_with_checked_indices()
