"""CRC32 as zlib has it; ISA-L computes the same number many times faster where the optional extra `fast` brings it."""

try:
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]
