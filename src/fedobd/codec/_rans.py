"""Compiled loops of the level coder: rANS with four interleaved lanes.

A lane is a state x in [L, 2^16 L), L = 2^31, beside words of 16 bits that all lanes share. With
frequencies that add up to M = 2^k, k ≤ 16, putting in a symbol of frequency f whose slots start at
c makes x grow by the factor M / f that its information takes:

1. while x ≥ f·2^(47-k), move the low word of x to the words, so that step 2 stays below 2^16 L;
2. x becomes ⌊x / f⌋·M + c + x mod f.

Taking it out is the reverse: x mod M lies among the slots of the symbol, and a word is read where
x fell below L. L is a multiple of M, so both sides move words at the same states. f·2^(47-k) ≥ L
and x < 2^16 L, so one word is always enough, and a symbol moves one at most.

A lane is a stack: symbols are put in from the last to the first, words are written from the end of
their buffer down, and both are then read forwards. The symbol at position i of a stream belongs to
lane i mod 4: a lane has to wait for its own last step (a look-up and a multiplication), and four
lanes fill that wait with one another's work.

All of it is integer arithmetic, so that streams are the same on every machine. Every index into a
buffer that depends on a stream is checked against the buffer's length: a stream can make a loop
stop, never leave a buffer.

References:
    Jarek Duda. Asymmetric numeral systems: entropy coding combining speed of Huffman coding with
    compression rate of arithmetic coding. 2013, arXiv 1311.2540.
    Fabian Giesen. Interleaved entropy coders. 2014, arXiv 1402.3392.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedobd.codec._compiled import compiled, multiply_high

LOWEST_STATE = 1 << 31
"""L: a lane's state is in [L, 2^16 L) between two symbols, and L before the first is put in."""


@compiled
def _put(x: Any, symbol: Any, entries: Any, words: Any, position: Any) -> Any:
    """Put a symbol into a lane; return its state, and where the words start now."""
    e = np.int64(symbol) * 4
    # The word is written in any case and counts only where the state is full: a branch that goes
    # either way at random would cost more than the write.
    words[position - 1] = np.uint16(x & np.uint64(0xFFFF))
    is_full = np.int64(x >= entries[e + 1])
    position -= is_full
    x >>= np.uint64(is_full << 4)
    # ⌊x / f⌋·M + c + x mod f = x + c + ⌊x / f⌋·(M - f), and ⌊x / f⌋ is the upper half of
    # x·⌈2^64 / f⌉: that is exact, since x·f < 2^64.
    return x + entries[e + 2] + multiply_high(x, entries[e]) * entries[e + 3], position


@compiled
def encode_symbols(
    symbols: Any, shift: Any, entries: Any, states: Any, first: Any, words: Any, position: Any
) -> Any:
    """Put unsigned symbols into four lanes, from the last to the first.

    `shift` low bits are put in as they are, the rest by `entries` as `make_entries` writes them.
    The lane of symbol i is (first + i) mod 4; its state, uint64, is changed. Words, uint16, are
    written from `position` down, at most 2 a symbol. Returns where they start now.
    """
    b = np.uint64(shift)
    low_bits = (np.uint64(1) << b) - np.uint64(1)
    for i in range(symbols.size - 1, -1, -1):
        lane = (first + i) & 3
        x = states[lane]
        if shift:  # a symbol of frequency 1 among 2^b, put in before what the decoder reads first
            if x >= np.uint64(1) << (np.uint64(47) - b):
                position -= 1
                words[position] = np.uint16(x & np.uint64(0xFFFF))
                x >>= np.uint64(16)
            x = (x << b) | (np.uint64(symbols[i]) & low_bits)
        states[lane], position = _put(x, np.uint64(symbols[i]) >> b, entries, words, position)
    return position


@compiled
def encode_symbols_fast(
    symbols: Any, entries: Any, states: Any, first: Any, words: Any, position: Any
) -> Any:
    """Do what `encode_symbols` does for no low bits, with the lanes in registers."""
    a, b, c, d = first & 3, (first + 1) & 3, (first + 2) & 3, (first + 3) & 3
    i = symbols.size - 1
    while i >= 0 and (i & 3) != 3:
        lane = (first + i) & 3
        states[lane], position = _put(states[lane], symbols[i], entries, words, position)
        i -= 1
    x0, x1, x2, x3 = states[a], states[b], states[c], states[d]
    while i >= 3:  # no range: numba would look for indices below 0 in each step
        x3, position = _put(x3, symbols[i], entries, words, position)
        x2, position = _put(x2, symbols[i - 1], entries, words, position)
        x1, position = _put(x1, symbols[i - 2], entries, words, position)
        x0, position = _put(x0, symbols[i - 3], entries, words, position)
        i -= 4
    states[a], states[b], states[c], states[d] = x0, x1, x2, x3
    return position


@compiled
def _take(x: Any, slot: Any, k: Any) -> Any:
    """Return the state without the symbol whose slot it points at: f·⌊x / M⌋ + x mod M - c."""
    low16 = np.uint64(0xFFFF)
    frequency = (slot >> np.uint64(16) & low16) + np.uint64(1)
    return frequency * (x >> k) + (slot & low16)


@compiled
def _refill(x: Any, words: Any, position: Any) -> Any:
    """Return the state with a word where it is too low, and the next word; one must be left."""
    is_low = np.int64(x < np.uint64(LOWEST_STATE))
    x = (x << np.uint64(is_low << 4)) | (np.uint64(words[position]) * np.uint64(is_low))
    return x, position + is_low


@compiled
def decode_symbols(
    words: Any,
    position: Any,
    states: Any,
    first: Any,
    slots: Any,
    k: Any,
    shift: Any,
    num_levels: Any,
    step: Any,
    offset: Any,
    values: Any,
) -> Any:
    """Take symbols out of four lanes, from the first to the last, and dequantize them.

    The reverse of `encode_symbols`, with `slots` as `make_slots` writes them for symbols without
    their `shift` low bits, and the next word at `position`. `values`, float32, become
    level · step + offset, both float32. Returns the next word; -1 where words are missing, -2
    where a level is beyond s = `num_levels`.
    """
    bits, b, lowest = np.uint64(k), np.uint64(shift), np.uint64(LOWEST_STATE)
    mask = (np.uint64(1) << bits) - np.uint64(1)
    low_bits = (np.uint64(1) << b) - np.uint64(1)
    for i in range(values.size):
        lane = (first + i) & 3
        slot = slots[states[lane] & mask]
        x = _take(states[lane], slot, bits)
        if x < lowest:
            if position >= words.size:
                return -1
            x = (x << np.uint64(16)) | np.uint64(words[position])
            position += 1
        symbol = slot >> np.uint64(32)
        if shift:
            symbol = (symbol << b) | (x & low_bits)
            x >>= b
            if x < lowest:
                if position >= words.size:
                    return -1
                x = (x << np.uint64(16)) | np.uint64(words[position])
                position += 1
        states[lane] = x
        level = np.int64(symbol) - num_levels
        if level > num_levels:  # the low bits of the largest symbol can say more than 2 s
            return -2
        scaled = np.float32(level) * step  # apart: in one expression the two could be fused
        values[i] = scaled + offset
    return position


@compiled
def decode_symbols_fast(
    words: Any, position: Any, states: Any, first: Any, slots: Any, k: Any, values: Any
) -> Any:
    """Do what `decode_symbols` does for no low bits, from slots that hold the values themselves.

    `slots` are as `make_slots` writes them for the bits of float32 values, so that a value is
    dequantized once a symbol and not once an element; `values` takes these bits, uint32, shape
    (n,). All else is as there.
    """
    bits, half = np.uint64(k), np.uint64(32)
    mask = (np.uint64(1) << bits) - np.uint64(1)
    a, b, c, d = first & 3, (first + 1) & 3, (first + 2) & 3, (first + 3) & 3
    x0, x1, x2, x3 = states[a], states[b], states[c], states[d]
    i = 0
    while i + 4 <= values.size and position + 4 <= words.size:
        slot = slots[x0 & mask]
        values[i] = np.uint32(slot >> half)
        x0, position = _refill(_take(x0, slot, bits), words, position)
        slot = slots[x1 & mask]
        values[i + 1] = np.uint32(slot >> half)
        x1, position = _refill(_take(x1, slot, bits), words, position)
        slot = slots[x2 & mask]
        values[i + 2] = np.uint32(slot >> half)
        x2, position = _refill(_take(x2, slot, bits), words, position)
        slot = slots[x3 & mask]
        values[i + 3] = np.uint32(slot >> half)
        x3, position = _refill(_take(x3, slot, bits), words, position)
        i += 4
    states[a], states[b], states[c], states[d] = x0, x1, x2, x3
    for rest in range(i, values.size):
        lane = (first + rest) & 3
        slot = slots[states[lane] & mask]
        values[rest] = np.uint32(slot >> half)
        x = _take(states[lane], slot, bits)
        if x < np.uint64(LOWEST_STATE):
            if position >= words.size:
                return -1
            x = (x << np.uint64(16)) | np.uint64(words[position])
            position += 1
        states[lane] = x
    return position
