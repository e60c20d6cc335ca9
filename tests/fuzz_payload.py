"""Fuzzes the readers: `python tests/fuzz_payload.py -max_total_time=60 CORPUSDIR`, by hand.

Golden and hostile payloads are mutated, their magic, version, fingerprint and checksum are made
right, and all they hold is decoded: whole, in small pieces, and by the second reader. Each must
give the same finite values or refuse; any exception but DecodeError, or two readers that differ,
is a finding. Wants atheris, which is not among the packages of the tests.
"""

from __future__ import annotations

import random
import shutil
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Only when run, since pytest imports all modules here and atheris may be absent. The compiled
# loops cannot be instrumented, and are imported when they are first needed.
if __name__ == "__main__":
    import atheris  # type: ignore[import-not-found, unused-ignore]

    sys.path.insert(0, str(ROOT))
    with atheris.instrument_imports(
        include=["fedobd"],
        exclude=[f"fedobd.codec.{name}" for name in ("kernels", "_rans", "_frequencies")],
    ):
        import fedobd.payload._decode  # noqa: F401

from fedobd.blocks import ModelSchema, Role  # noqa: E402
from fedobd.codec import MAX_LEVELS, Coding, SegmentCode  # noqa: E402
from fedobd.payload._wire import pack_header  # noqa: E402
from tests.golden.make import FOLDER as GOLDEN  # noqa: E402
from tests.golden.make import make_header  # noqa: E402
from tests.golden.slow_coder import Part, alphabet, encode_stream, make_table, varint  # noqa: E402
from tests.hostile.readers import check_alike, schemas_by_fingerprint  # noqa: E402

HOSTILE = ROOT / "tests" / "hostile"
FINGERPRINT = slice(13, 29)
SCHEMAS = schemas_by_fingerprint()
ORDER = sorted(SCHEMAS)


def repaired(data: bytes) -> tuple[bytes, ModelSchema]:
    """Make magic, version, fingerprint and checksum right, so that what is behind them is read."""
    body = bytearray(data[:-4].ljust(29, b"\0"))
    body[:5] = b"FOBD\2"
    if bytes(body[FINGERPRINT]) not in SCHEMAS:
        body[FINGERPRINT] = ORDER[zlib.crc32(body) % len(ORDER)]
    schema = SCHEMAS[bytes(body[FINGERPRINT])]
    return bytes(body) + zlib.crc32(body).to_bytes(4, "little"), schema


def one_input(data: bytes) -> None:
    payload, schema = repaired(data)
    check_alike(payload, schema)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Change some bits or bytes where they are, so that lengths stay right."""
    body = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4, 8)) if body else 0):
        place = rng.randrange(len(body))
        if rng.random() < 0.5:
            body[place] ^= 1 << rng.randrange(8)
        else:
            body[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(body)


def random_part(count: int, rng: random.Random) -> Part:
    """Make symbols of a segment and a table for them that has room."""
    num_levels = rng.choice((1, 2, 40, 2047, 2048, 5000, rng.randint(1, MAX_LEVELS), MAX_LEVELS))
    spread = rng.choice((0, 1, num_levels))
    symbols = [num_levels + rng.randint(-spread, spread) for _ in range(count)]
    if rng.random() < 0.3:
        return Part(symbols, num_levels)
    least = min(16, min(count, alphabet(num_levels)).bit_length() + 1)
    table = make_table(symbols, num_levels, rng.randint(least, 16), rng.randint(0, 15))
    return Part(symbols, num_levels, table)


def fresh_payload(rng: random.Random) -> bytes:
    """Make a payload of levels alone, whose streams are damaged within their frames."""
    schema = SCHEMAS[rng.choice(ORDER)]
    codes, streams = [], []
    for block in schema.blocks:
        parts = []
        block_codes = []
        for segment in block.segments:
            count, role = segment.num_elements, schema.tensors[segment.tensor].role
            if role is Role.PARAMETER and 0 < count < 500:
                parts.append(random_part(count, rng))
                code = SegmentCode(Coding.LEVELS, parts[-1].num_levels, 0.25, rng.random() + 0.1)
            else:
                code = SegmentCode(Coding.RAW)
            block_codes.append(code)
        codes.append(block_codes)
        stream = damaged(encode_stream(parts, rng.choice((12, 18, 40))), rng) if parts else None
        streams.append(stream)
    kept = [i for i, stream in enumerate(streams) if stream is not None and rng.random() < 0.8]
    body = pack_header(schema, make_header(schema, kept=kept), [codes[i] for i in kept])
    for i in kept:
        stream = streams[i] or b""
        body += varint(len(stream)) + stream
        for role in (Role.PARAMETER, Role.BUFFER):
            plain = [
                schema.tensors[segment.tensor].wire_dtype.itemsize * segment.num_elements
                for segment, code in zip(schema.blocks[i].segments, codes[i], strict=True)
                if code.coding is Coding.RAW and schema.tensors[segment.tensor].role is role
            ]
            if plain:
                body += varint(sum(plain)) + bytes(sum(plain))
    return body + bytes(4)


def mutated(data: bytes, max_size: int, seed: int) -> bytes:
    """Mutate as libFuzzer does, in place, or start anew."""
    rng = random.Random(seed)  # noqa: S311
    choice = rng.random()
    if choice < 0.4:
        result: bytes = atheris.Mutate(data, max_size)
    elif choice < 0.8:
        result = damaged(data, rng)
    else:
        result = fresh_payload(rng)
    return repaired(result)[0][:max_size]


def main() -> None:
    folders = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("-")]
    if folders:
        folders[0].mkdir(parents=True, exist_ok=True)
        for path in [*GOLDEN.glob("*.bin"), *HOSTILE.glob("*.bin")]:
            shutil.copy(path, folders[0] / f"{path.parent.name}-{path.name}")
    options = ["-max_len=2048", "-rss_limit_mb=4096", "-timeout=20"]
    atheris.Setup([*sys.argv, *options], one_input, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
