"""Writes the hostile payloads and STORIES.md: `PYTHONPATH=src python -m tests.hostile.make`.

Each file has its checksum right (where it has one), so that what it tries is reached. Payloads are
for the schemas of golden ones. Some are odd but legal: those must be read.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from tests.golden.make import FOLDER as GOLDEN
from tests.golden.slow_coder import (
    BitWriter,
    Part,
    Table,
    encode_stream,
    make_table,
    varint,
)
from tests.hostile.readers import schemas

FOLDER = Path(__file__).parent
LEGAL = "legal"

SMALL, MIXED, FRESH, ICE, LONG = (
    "broadcast_bf16",
    "upload_masked",
    "delivery_tables",
    "opening_frozen",
    "broadcast_two_chunks",
)
OPENING, BROADCAST, UPLOAD, DELIVERY = range(4)
MOST = 2**63 - 1


@dataclass(frozen=True)
class Hostile:
    """A payload, the golden one whose schema it is for, why it is refused, and its story."""

    data: bytes
    schema: str
    reason: str
    story: str
    by_client: bool = False


def f32(value: float) -> bytes:
    return struct.pack("<f", value)


def closed(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def head(
    schema: str,
    bitmap: int,
    *,
    kind: int = BROADCAST,
    flags: int = 0,
    fields: bytes = b"",
    version: int = 2,
    magic: bytes = b"FOBD",
) -> bytes:
    """Give a header up to its bitmap, of round 3."""
    fixed = struct.pack("<4sBBBBIB", magic, version, kind, 5, flags, 3, 1)
    return fixed + schemas()[schema].fingerprint + fields + bytes([bitmap])


def frame(data: bytes) -> bytes:
    return varint(len(data)) + data


def golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.bin").read_bytes()


# Block 0 of SMALL: nine parameters `w` of bfloat16, and three buffers `mean` as float32.
MEAN = frame(f32(0.5) * 3)
SYMBOLS = [0, 1, 2, 3, 4, 3, 2, 1, 0]


def small(
    stream: bytes,
    *,
    num_levels: bytes = b"\x02",
    offset: float = 0.0,
    span: float = 1.0,
    length: bytes | None = None,
    tail: bytes = MEAN,
) -> bytes:
    """Give a broadcast of block 0 of SMALL with its stream, in five symbols unless told."""
    code = b"\1" + num_levels + f32(offset) + f32(span) + b"\2"
    framed = (varint(len(stream)) if length is None else length) + stream
    return closed(head(SMALL, 1) + code + framed + tail)


def stream_of(table: Table | None = None, num_levels: int = 2, c: int = 12) -> bytes:
    return encode_stream([Part(SYMBOLS, num_levels, table)], c)


GOOD = stream_of()
TABLES_END = 2  # chunk size, and one byte for the bit of the uniform table


def table_stream(*fields: tuple[int, int]) -> bytes:
    """Give a stream whose table is written field by field, and chunks that begin as usual."""
    writer = BitWriter()
    for value, count in fields:
        if count < 0:
            writer.gamma(value)
        else:
            writer.put(value, count)
    return b"\x0c" + writer.to_bytes() + GOOD[TABLES_END:]


GAMMA = -1


def opened_table(k: int, m: int, unwritten: int, count: int) -> list[tuple[int, int]]:
    """Give the fields that open a table for five symbols."""
    return [(1, 1), (k - 1, 4), (m, 4), (unwritten, 3), (count + 1, GAMMA)]


def states_of(*changed: tuple[int, int]) -> bytes:
    """Give the good stream with other lane states."""
    data = bytearray(GOOD)
    for lane, state in changed:
        place = TABLES_END + 6 * lane
        data[place : place + 6] = state.to_bytes(6, "little")
    return bytes(data)


def header_cases() -> Iterator[tuple[str, Hostile]]:
    raw = golden("broadcast_raw")
    yield "empty", Hostile(b"", SMALL, "truncated", "nothing at all")
    yield "shortest", Hostile(closed(raw[:28]), SMALL, "truncated", "one byte less than a header")
    yield (
        "header_alone",
        Hostile(closed(raw[:29]), "broadcast_raw", "truncated", "a header, and no bitmap"),
    )
    other = closed(head(SMALL, 0, magic=b"PK\3\4"))
    yield "magic", Hostile(other, SMALL, "version", "the magic of a ZIP archive")
    for version in (0, 1, 3, 255):
        data = closed(head(SMALL, 0, version=version))
        story = f"version {version}, whose bytes may mean anything"
        yield f"version_{version}", Hostile(data, SMALL, "version", story)
    for kind in (4, 255):
        data = closed(head(SMALL, 0, kind=kind))
        yield f"kind_{kind}", Hostile(data, SMALL, "kind", f"kind {kind}, which nobody knows")
    for flag in (64, 128):
        data = closed(head(SMALL, 0, flags=flag))
        yield f"flag_{flag}", Hostile(data, SMALL, "field", f"flag {flag}, which nobody knows")
    other = closed(head(MIXED, 0))
    yield "other_model", Hostile(other, SMALL, "schema", "a payload for another model")
    wrong = golden(SMALL)[:-1] + b"\0"
    yield "checksum", Hostile(wrong, SMALL, "checksum", "a checksum that is not its own")
    data = closed(head(SMALL, 4))
    yield "bitmap_past_end", Hostile(data, SMALL, "field", "block 2 of two blocks")
    data = closed(head(SMALL, 0x80))
    yield "bitmap_last_bit", Hostile(data, SMALL, "field", "block 7 of two blocks")
    data = closed(head(SMALL, 0))
    yield "no_blocks", Hostile(data, SMALL, LEGAL, "a broadcast of no block")


def report(examples: int, loss: float, validation: int, *losses: float) -> bytes:
    return struct.pack("<IQfQff", 2**32 - 1, examples, loss, validation, *losses)


def optional_cases() -> Iterator[tuple[str, Hostile]]:
    data = closed(head(SMALL, 0, kind=UPLOAD))
    yield "upload_without_report", Hostile(data, SMALL, "field", "an upload that hides its weight")
    fields = report(1, 0, 0, 0, 0)
    data = closed(head(SMALL, 0, flags=1, fields=fields))
    yield "broadcast_with_report", Hostile(data, SMALL, "field", "a server that plays a client")
    data = closed(head(SMALL, 0, kind=UPLOAD, flags=1, fields=report(MOST, 0, MOST, 0, 0)))
    story = "2^63 - 1 examples, whose sums overflow; legal here, and the server refuses it"
    yield "report_largest", Hostile(data, SMALL, LEGAL, story)
    for name, fields, story in (
        ("examples", report(2**63, 0, 0, 0, 0), "2^63 examples, negative in 64 bits"),
        ("validation", report(1, 0, 2**64 - 1, 0, 0), "2^64 - 1 validation examples, or -1"),
        ("loss_nan", report(1, math.nan, 0, 0, 0), "a loss of NaN, which spoils every mean"),
        ("validation_inf", report(1, 0, 0, math.inf, 0), "an infinite validation loss"),
        ("metric_inf", report(1, 0, 0, 0, -math.inf), "a metric of minus infinity"),
    ):
        data = closed(head(SMALL, 0, kind=UPLOAD, flags=1, fields=fields))
        yield f"report_{name}", Hostile(data, SMALL, "field", story)
    data = closed(head(SMALL, 0, kind=UPLOAD, flags=1, fields=report(1, 0, 0, 0, 0)[:20])[:-1])
    yield "report_cut", Hostile(data, SMALL, "truncated", "a report without its end")
    start = bytes(16)
    for kind, name in ((UPLOAD, "upload"), (DELIVERY, "delivery")):
        fields = report(1, 0, 0, 0, 0) if kind == UPLOAD else b""
        flags = 33 if kind == UPLOAD else 32
        data = closed(head(SMALL, 3, kind=kind, flags=flags, fields=fields + start))
        story = f"a {name} that stands for a model instead of holding it"
        yield f"start_in_{name}", Hostile(data, SMALL, "field", story)
    data = closed(head(SMALL, 3, flags=32, fields=start) + b"\2\2\2\2")
    yield "start_with_codes", Hostile(data, SMALL, "trailing bytes", "a start, and codes after it")
    data = closed(head(SMALL, 3, flags=32, fields=start)[:40])
    yield "start_cut", Hostile(data, SMALL, "truncated", "a start without its end")
    for name, value in (("nan", math.nan), ("inf", math.inf), ("negative", -1e-45)):
        data = closed(head(SMALL, 0, flags=4, fields=f32(0) + f32(value)))
        story = f"a mean block difference of {value}, to be chosen first"
        yield f"block_difference_{name}", Hostile(data, SMALL, "field", story)
    data = closed(head(SMALL, 0, flags=4, fields=f32(-0.0) * 2))
    yield "block_difference_minus_0", Hostile(data, SMALL, LEGAL, "a mean block difference of -0")
    everything = struct.pack("<QQ", 0, 0)
    data = closed(head(SMALL, 2, flags=2, fields=everything) + b"\3\2" + frame(bytes(8)))
    data = closed(data[:-4] + frame(bytes(3)))
    story = "a mask in a broadcast, so that clients train on a model with holes"
    yield "mask_in_broadcast", Hostile(data, SMALL, "field", story, by_client=True)
    data = closed(head(SMALL, 0, flags=8))
    story = "differences in a broadcast, to a broadcast that there is not"
    yield "differences_in_broadcast", Hostile(data, SMALL, "field", story, by_client=True)
    data = closed(head(SMALL, 1, flags=2, fields=everything) + b"\1\2" + f32(0) + f32(1) + b"\2")
    yield "mask_with_levels", Hostile(data, SMALL, "field", "levels where the mask wants values")
    data = closed(head(SMALL, 1, flags=2, fields=everything) + b"\3\3")
    yield "mask_on_buffer", Hostile(data, SMALL, "field", "a masked buffer")
    data = closed(head(SMALL, 1) + b"\3\2" + frame(bytes(18)) + MEAN)
    yield "masked_without_mask", Hostile(data, SMALL, "field", "masked values without a mask")


def code_cases() -> Iterator[tuple[str, Hostile]]:
    for coding in (4, 255):
        data = closed(head(SMALL, 1) + bytes([coding, 2]) + MEAN)
        yield f"coding_{coding}", Hostile(data, SMALL, "field", f"coding {coding}")
    data = closed(head(SMALL, 1) + b"\2\1\2" + f32(0) + f32(1) + frame(bytes(18)) + MEAN)
    yield "buffer_in_levels", Hostile(data, SMALL, "field", "a buffer in levels")
    data = closed(head(SMALL, 1) + b"\2\0" + f32(0) + frame(bytes(18)))
    yield "buffer_constant", Hostile(data, SMALL, "field", "a constant buffer")
    codes = b"\2\2\2\2"
    data = closed(head(FRESH, 1) + codes + b"\1\1" + f32(0) + f32(1) + b"\2")
    yield "levels_of_nothing", Hostile(data, FRESH, "field", "levels of a tensor without elements")
    data = closed(head(FRESH, 1) + codes + b"\0" + f32(0) + b"\2")
    yield "constant_of_nothing", Hostile(data, FRESH, "field", "a constant without elements")
    for value in (math.nan, math.inf, -math.inf):
        data = closed(head(SMALL, 1) + b"\0" + f32(value) + b"\2" + MEAN)
        name = f"constant_{value}".replace("-", "minus_")
        yield name, Hostile(data, SMALL, "not finite", f"a constant of {value}")
    for name, written, reason in (
        ("0", b"\0", "limit"),
        ("2_22_and_1", varint(2**22 + 1), "limit"),
        ("2_63_less_1", varint(MOST), "limit"),
        ("overlong", b"\x82\0", "field"),
        ("nine_bytes", b"\x82" + b"\x80" * 7 + b"\0", "field"),
        ("ten_bytes", b"\xff" * 9 + b"\1", "field"),
        ("endless", b"\xff" * 40, "field"),
    ):
        data = small(GOOD, num_levels=written)
        story = f"a number of levels written as {written[:10].hex()}"
        yield f"levels_{name}", Hostile(data, SMALL, reason, story)
    data = small(b"\x0c\0" + GOOD[2:], num_levels=varint(2**22))
    story = "the most levels, in a stream that was made for few"
    yield "levels_2_22", Hostile(data, SMALL, "stream", story)
    for span in (0.0, -0.0, -1.0, -1e-45, math.nan, math.inf, 2.0**127):
        name = f"range_{span}".replace("-", "minus_").replace("+", "")
        data = small(GOOD, span=span)
        yield name, Hostile(data, SMALL, "field", f"a range of {span}")
    for offset in (math.nan, math.inf, -math.inf, -(2.0**127)):
        name = f"offset_{offset}".replace("-", "minus_").replace("+", "")
        data = small(GOOD, offset=offset)
        yield name, Hostile(data, SMALL, "field", f"an offset of {offset}")
    data = small(GOOD, span=1e-45)
    yield "range_subnormal", Hostile(data, SMALL, LEGAL, "the smallest range, whose step is 0")
    data = small(GOOD, span=2.0**126, offset=2.0**126)
    yield "range_largest", Hostile(data, SMALL, LEGAL, "the largest values that levels can have")


def length_cases() -> Iterator[tuple[str, Hostile]]:
    size = len(GOOD)
    for name, written, reason in (
        ("0", b"\0", "trailing bytes"),
        ("1", b"\1", "field"),
        ("one_less", varint(size - 1), "field"),
        ("one_more", varint(size + 1), "field"),
        ("largest", varint(MOST), "limit"),
        ("beyond_cap", varint(4101), "limit"),
        ("past_end", varint(4000), "truncated"),
        ("overlong", bytes([size | 0x80, 0]), "field"),
        ("ten_bytes", b"\xff" * 9 + b"\1", "field"),
    ):
        data = small(GOOD, length=written)
        story = f"{size} bytes of levels whose length says {written.hex()}"
        yield f"level_frame_{name}", Hostile(data, SMALL, reason, story)
    data = small(b"", length=b"\0")
    yield "level_frame_empty", Hostile(data, SMALL, "stream", "levels without a stream")
    for name, written in (
        ("0", b"\0"),
        ("one_less", b"\x0b"),
        ("one_more", b"\x0d"),
        ("largest", varint(MOST)),
        ("overlong", b"\x8c\0"),
    ):
        data = small(GOOD, tail=written + f32(0.5) * 3)
        story = f"12 bytes of buffers whose length says {written.hex()}"
        yield f"plain_frame_{name}", Hostile(data, SMALL, "field", story)
    data = small(GOOD, tail=b"")
    yield "plain_frame_missing", Hostile(data, SMALL, "truncated", "no frame of buffers")
    data = small(GOOD, tail=b"\x80")
    yield "plain_frame_cut_length", Hostile(data, SMALL, "truncated", "half a length")
    data = small(GOOD, tail=MEAN + b"\0")
    yield "trailing_byte", Hostile(data, SMALL, "trailing bytes", "one byte after the last frame")
    data = closed(golden(SMALL) + golden(SMALL)[:-4])
    yield "trailing_payload", Hostile(data, SMALL, "trailing bytes", "a second payload behind")


def table_cases() -> Iterator[tuple[str, Hostile]]:
    for c in (0, 11, 41, 255):
        story = f"chunks of 2^{c}"
        yield f"chunks_{c}", Hostile(small(bytes([c]) + GOOD[1:]), SMALL, "stream", story)
    for c in (12, 40):
        yield f"chunks_{c}", Hostile(small(stream_of(c=c)), SMALL, LEGAL, f"chunks of 2^{c}")
    # frequencies of symbols 0, 1, 2 ... of 2^15 each: nothing, or less, is left for the unwritten
    entry = [(0, 1), ((1 << 30) - 1, 31), (0, 0)]
    again = [(0, 1), (0, 1)]
    for name, fields, story in (
        (
            "remainder_0",
            [*opened_table(16, 0, 4, 2), *entry, *again],
            "k = 16, and frequencies that leave 0",
        ),
        (
            "remainder_negative",
            [*opened_table(16, 0, 4, 4), *entry, *again, *again, *again],
            "k = 16, and frequencies that leave -2^16",
        ),
        (
            "remainder_of_k_1",
            [*opened_table(1, 0, 0, 1), (0, 1), (3, 3)],
            "k = 1, and a frequency that takes all of it",
        ),
        ("unwritten_5", opened_table(8, 0, 5, 0), "the rest to symbol 5 of 0 to 4"),
        ("unwritten_7", opened_table(8, 0, 7, 0), "the rest to symbol 7 of 0 to 4"),
        ("count_5", opened_table(8, 0, 0, 5), "six frequencies for five symbols"),
        ("count_65535", opened_table(8, 0, 0, 65535), "65536 frequencies for five symbols"),
        (
            "gap_past_end",
            [*opened_table(8, 0, 0, 1), (1, 1), (4, GAMMA), (0, 1)],
            "a frequency for symbol 5 of 0 to 4",
        ),
        (
            "gap_65536",
            [*opened_table(8, 0, 0, 1), (1, 1), (65536, GAMMA), (0, 1)],
            "a frequency for symbol 65537 of 0 to 4",
        ),
        ("gamma_17_zeros", [*opened_table(8, 0, 0, 0)[:-1], (0, 17), (1, 18)], "a long gamma"),
        ("gamma_endless", [*opened_table(8, 0, 0, 0)[:-1], (0, 400)], "a gamma without an end"),
        (
            "length_minus_1",
            [*opened_table(8, 0, 0, 1), (0, 1), (1, 2)],
            "a frequency of 2^-1",
        ),
        (
            "length_16",
            [*opened_table(16, 0, 0, 1), (0, 1), ((1 << 32) - 1, 33)],
            "a frequency of 2^16",
        ),
        (
            "length_endless",
            [*opened_table(16, 0, 0, 1), (0, 1), ((1 << 400) - 1, 400)],
            "a frequency whose length has no end",
        ),
    ):
        yield f"table_{name}", Hostile(small(table_stream(*fields)), SMALL, "stream", story)
    writer = BitWriter()
    writer.put(0xFFFF, 13)
    cut = b"\x0c" + writer.to_bytes()
    yield "table_cut", Hostile(small(cut), SMALL, "stream", "a table without its end")
    yield "table_alone", Hostile(small(b"\x0c"), SMALL, "stream", "a chunk size, and no table")
    data = small(GOOD[:1] + b"\x02" + GOOD[2:])
    yield "table_padding", Hostile(data, SMALL, "stream", "a bit set between table and chunks")
    one = Table(16, 0, (0, 0, 1 << 16, 0, 0), 2)
    stream = encode_stream([Part([2] * 9, 2, one)], 12)
    story = "k = 16 and one symbol of frequency 2^16, in no bits"
    yield "table_of_one", Hostile(small(stream), SMALL, LEGAL, story)
    for k, m in ((16, 15), (3, 0)):
        stream = stream_of(make_table(SYMBOLS, 2, k, m))
        story = f"a table that no encoder chooses: k = {k}, m = {m}"
        yield f"table_{k}_{m}", Hostile(small(stream), SMALL, LEGAL, story)


def chunk_cases() -> Iterator[tuple[str, Hostile]]:
    low = 1 << 31
    for name, lane, state in (
        ("0", 0, 0),
        ("below", 1, low - 1),
        ("above", 2, low << 16),
        ("largest", 3, (1 << 48) - 1),
    ):
        story = f"{state:#x} as the state of lane {lane}"
        stream = states_of((lane, state))
        yield f"state_{name}", Hostile(small(stream), SMALL, "stream", story)
    stream = states_of(*((lane, (low << 16) - 1) for lane in range(4)))
    yield "states_full", Hostile(small(stream), SMALL, "stream", "four states of 2^47 - 1")
    yield "words_missing", Hostile(small(GOOD[:-2]), SMALL, "stream", "one word less")
    yield "words_odd", Hostile(small(GOOD[:-1]), SMALL, "stream", "half a word less")
    yield "words_extra", Hostile(small(GOOD + b"\0\0"), SMALL, "stream", "one word more")
    yield "words_many", Hostile(small(GOOD + bytes(1500)), SMALL, "stream", "750 words more")
    yield "states_cut", Hostile(small(GOOD[:20]), SMALL, "stream", "three states")
    symbols = [2 * 5000 + 3] + [5000] * 8
    stream = encode_stream([Part(symbols, 5000, None)], 12)
    data = small(stream, num_levels=varint(5000))
    story = "level 5003 of 5000: low bits that the largest symbol does not have"
    yield "level_beyond", Hostile(data, SMALL, "stream", story)
    yield from two_chunk_cases()


def two_chunk_cases() -> Iterator[tuple[str, Hostile]]:
    parts = [Part([0] * 4101, 1, Table(1, 0, (2, 0, 0), 0)), Part([0] * 6, 1, None)]
    stream = encode_stream(parts, 12)
    place = stream.index(b"\0\0\0\x80\0\0") - 1  # the number of words of the first chunk, 0
    assert stream[place] == 0

    def long(written: bytes, body: bytes) -> bytes:
        code = b"\1\1" + f32(0) + f32(1)
        changed = stream[:place] + written + body
        return closed(head(LONG, 1) + code * 2 + frame(changed))

    rest = stream[place + 1 :]
    yield (
        "chunk_in_no_bits",
        Hostile(long(b"\0", rest), LONG, LEGAL, "4096 levels in a chunk of no words"),
    )
    for name, written, reason, story in (
        ("2_62", varint(2**62), "stream", "a chunk of 2^62 words"),
        ("largest", varint(MOST), "stream", "a chunk of 2^63 - 1 words"),
        ("overlong", b"\x80\0", "stream", "a number of words in more bytes than it needs"),
        ("one_more", b"\1", "stream", "a chunk that says one word more"),
        ("all", varint(len(rest) // 2), "stream", "a chunk that takes what the next one needs"),
    ):
        yield f"chunk_words_{name}", Hostile(long(written, rest), LONG, reason, story)
    data = long(b"\x80", b"")
    yield "chunk_words_cut", Hostile(data, LONG, "stream", "half a number of words")
    yield "chunk_missing", Hostile(long(b"\0", rest[:24]), LONG, "stream", "no second chunk")


def zstd_frame(stated: int, *blocks: bytes) -> bytes:
    """Give a Zstandard frame of one segment that says how much it holds."""
    return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", stated) + b"".join(blocks)


def zstd_block(kind: int, size: int, content: bytes, *, last: bool = True) -> bytes:
    return struct.pack("<I", int(last) | kind << 1 | size << 3)[:3] + content


def compressed_cases() -> Iterator[tuple[str, Hostile]]:
    def packed(w: bytes, length: bytes | None = None) -> bytes:
        mean = zstandard.ZstdCompressor().compress(bytes(12))
        framed = (varint(len(w)) if length is None else length) + w
        return closed(head(SMALL, 1, flags=16) + b"\2\2" + framed + frame(mean))

    raw, repeated = 0, 1
    good = zstd_frame(18, zstd_block(raw, 18, bytes(18)))
    yield "zstd_by_hand", Hostile(packed(good), SMALL, LEGAL, "a frame that no library made")
    thousand = [zstd_block(repeated, 1 << 17, b"\0", last=i == 199) for i in range(200)]
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(18))
    skippable = struct.pack("<II", 0x184D2A50, 18) + bytes(18)
    window = b"\x28\xb5\x2f\xfd\x80\xa8" + struct.pack("<I", 18)
    dictionary = b"\x28\xb5\x2f\xfd\x21\x07\x12" + zstd_block(raw, 18, bytes(18))
    for name, w, story in (
        ("bomb_stated", zstd_frame(200 << 17, *thousand), "25 MB of zeros, and it says so"),
        ("bomb_lying", zstd_frame(18, *thousand), "25 MB of zeros that say they are 18 bytes"),
        ("2_63_stated", zstd_frame(1 << 63, zstd_block(raw, 18, bytes(18))), "2^63 bytes stated"),
        ("largest_stated", zstd_frame(2**64 - 3, zstd_block(raw, 0, b"")), "2^64 - 3 bytes"),
        ("less", zstd_frame(18, zstd_block(raw, 17, bytes(17))), "17 bytes that say they are 18"),
        ("none", zstd_frame(18, zstd_block(raw, 0, b"")), "no bytes that say they are 18"),
        ("unsized", unsized, "a frame that does not say what it holds"),
        ("skippable", skippable, "a skippable frame of 18 bytes"),
        ("dictionary", dictionary, "a frame that wants a dictionary"),
        ("two_frames", good + zstd_frame(0, zstd_block(raw, 0, b"")), "a second, empty frame"),
        ("trailing", good + b"\0", "a byte after the frame"),
        ("cut", good[:-5], "a frame without its end"),
        (
            "cut_window",
            window + zstd_block(raw, 18, bytes(9)),
            "a window of 2 GB and half a block",
        ),
        ("reserved", zstd_frame(18, zstd_block(3, 18, bytes(18))), "a block of the reserved kind"),
        ("garbage", bytes(range(40)), "no frame at all"),
    ):
        yield f"zstd_{name}", Hostile(packed(w), SMALL, "stream", story)
    data = packed(bytes(1043), varint(18 + 1025))
    yield "zstd_beyond_cap", Hostile(data, SMALL, "limit", "1043 bytes for 18")
    data = packed(good, varint(MOST))
    yield "zstd_largest_length", Hostile(data, SMALL, "limit", "2^63 - 1 bytes for 18")
    nan = zstd_frame(18, zstd_block(raw, 18, b"\xc0" * 9 + b"\x7f" * 9))
    yield "zstd_nan", Hostile(packed(nan), SMALL, "not finite", "compressed NaN")
    nothing = struct.pack("<QQ", 0, 2**64 - 1)
    base = head(SMALL, 2, flags=18, fields=nothing) + b"\3\2"
    flags_frame = frame(zstandard.ZstdCompressor().compress(bytes(3)))
    empty = bytes.fromhex("28b52ffd2000010000")
    data = closed(base + frame(empty) + flags_frame)
    yield "zstd_of_nothing", Hostile(data, SMALL, LEGAL, "a mask that keeps nothing, compressed")
    for name, w in (
        ("empty", b""),
        ("skippable", struct.pack("<II", 0x184D2A50, 900) + bytes(900)),
        ("other", zstd_frame(0, zstd_block(raw, 0, b""))),
        ("bomb", zstd_frame(0, *thousand)),
    ):
        data = closed(base + frame(w) + flags_frame)
        story = f"a mask that keeps nothing, and a frame that is {name}"
        yield f"zstd_of_nothing_{name}", Hostile(data, SMALL, "stream", story)


def plain_cases() -> Iterator[tuple[str, Hostile]]:
    for name, pattern in (("nan", b"\xc0\x7f"), ("inf", b"\x80\x7f"), ("minus_inf", b"\x80\xff")):
        w = bytes(16) + pattern
        data = closed(head(SMALL, 1) + b"\2\2" + frame(w) + MEAN)
        yield f"value_{name}", Hostile(data, SMALL, "not finite", f"a parameter of {name}")
    data = small(GOOD, tail=frame(bytes(8) + f32(math.inf)))
    yield "buffer_inf", Hostile(data, SMALL, "not finite", "an infinite buffer after good levels")
    ice = head(ICE, 0, kind=OPENING)
    table, scale, half, ids = bytes(24), bytes(8), bytes(4), bytes(12)
    for name, values in (
        ("float32", f32(math.nan) * 6 + scale + half + ids),
        ("float64", table + struct.pack("<d", -math.inf) + half + ids),
        ("float16", table + scale + b"\0\x7c\0\0" + ids),
    ):
        data = closed(ice + frame(values))
        story = f"a frozen {name} that is not finite"
        yield f"frozen_{name}", Hostile(data, ICE, "not finite", story)
    data = closed(ice)
    yield "frozen_missing", Hostile(data, ICE, "truncated", "an opening without frozen tensors")
    data = closed(ice + frame(table + scale + half + ids[:-1]))
    yield "frozen_short", Hostile(data, ICE, "field", "frozen tensors that lack a byte")
    data = closed(head(ICE, 0) + frame(table + scale + half + ids))
    yield (
        "frozen_in_broadcast",
        Hostile(data, ICE, "trailing bytes", "frozen tensors in a broadcast"),
    )
    data = closed(head(SMALL, 2) + b"\2\2" + frame(bytes(8)) + frame(b"\2\xff\0"))
    yield "bool_2", Hostile(data, SMALL, LEGAL, "booleans of 2 and 255, which are true")


def hostile_cases() -> dict[str, Hostile]:
    """The hostile payloads by name."""
    cases: dict[str, Hostile] = {}
    for group in (
        header_cases,
        optional_cases,
        code_cases,
        length_cases,
        table_cases,
        chunk_cases,
        compressed_cases,
        plain_cases,
    ):
        for name, case in group():
            assert name not in cases, name
            cases[name.replace(".", "_")] = case
    return cases


def write_hostile() -> None:
    """Write every hostile file and the table of their stories."""
    cases = hostile_cases()
    for path in FOLDER.glob("*.bin"):
        path.unlink()
    lines = [
        "# Hostile payloads",
        "",
        "Written by `tests/hostile/make.py`; `schema` is the golden payload whose schema a file",
        "is for. A legal one is odd, and must be read. Those by a client are refused when a",
        "client takes them in, since `Payload` alone cannot know what they are for.",
        "",
        "| file | schema | reason | what it tries |",
        "| --- | --- | --- | --- |",
    ]
    for name, case in cases.items():
        (FOLDER / f"{name}.bin").write_bytes(case.data)
        reason = case.reason + (" (client)" if case.by_client else "")
        lines.append(f"| {name} | {case.schema} | {reason} | {case.story} |")
    (FOLDER / "STORIES.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write_hostile()
