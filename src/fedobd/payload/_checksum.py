"""The checksum of payloads: CRC-32 as in zlib and PNG.

zlib-ng, which `fedobd[fast]` brings, works out the same value with the processor's carry-less
multiplication: 80 GB/s in place of 5 where a payload lies in the cache.
"""

try:
    from zlib_ng.zlib_ng import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]
