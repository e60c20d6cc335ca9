"""The checksum, with zlib-ng and without."""

from __future__ import annotations

import importlib
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedobd.payload import _checksum


@given(st.binary(max_size=5000), st.integers(0, 2**32 - 1))
def test_it_is_the_one_of_zlib(data: bytes, start: int) -> None:
    assert _checksum.crc32(memoryview(data), start) == zlib.crc32(data, start)


def test_without_zlib_ng_it_is_zlib_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _checksum.crc32 is not zlib.crc32
    monkeypatch.setitem(sys.modules, "zlib_ng.zlib_ng", None)
    try:
        assert importlib.reload(_checksum).crc32 is zlib.crc32
    finally:
        monkeypatch.undo()
        importlib.reload(_checksum)
