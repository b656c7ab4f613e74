"""A picture says what it was drawn from: one line in its file, which viewers ignore.

``results`` is a digest of the result files that the drawing read and of the code that drew them,
``picture`` one of the file without the line. So a check can tell a picture that is stale, or that
was changed or swapped, without drawing it again: pixels differ between versions of matplotlib.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER_END = len(_SIGNATURE) + 25  # the signature, then IHDR: length, name, 13 bytes, CRC
_KEYWORD = b"ila-drawn-from\0"
_SVG_BEGIN, _SVG_END = b"<!-- ila-drawn-from ", b" -->\n"


class Reading(Mapping[str, Any]):
    """Results by name that remember which of them were asked for.

    Args:
        results: Name -> parsed content.
        digests: Name -> digest of the file.
    """

    def __init__(self, results: Mapping[str, Any], digests: Mapping[str, str]):
        self._results, self._digests = results, digests
        self._read: dict[str, str | None] = {}
        self._closed = False

    def __getitem__(self, name: str) -> Any:
        if self._closed and name not in self._read:
            raise RuntimeError(f"figures() must read {name!r} before it returns: it is stamped so")
        self._read[name] = self._digests.get(name)
        return self._results[name]

    def __contains__(self, name: object) -> bool:
        if isinstance(name, str) and name not in self._results:
            self._read[name] = None  # a file that appears makes another picture
        return name in self._results

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def close(self, *more: bytes) -> str:
        """Refuse results not read so far; return the digest of those read, and of ``more``."""
        self._closed = True
        read = repr(sorted(self._read.items(), key=lambda item: item[0])).encode()
        return digest(read, *more)


def digest(*parts: bytes) -> str:
    """The first 32 hex digits of SHA-256 over the parts and their lengths."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "big") + part)
    return sha.hexdigest()[:32]


def stamp(data: bytes, results: str) -> bytes:
    """Put a line into the bytes of a PNG or SVG.

    Raises:
        ValueError: ``data`` is neither.
    """
    line = f"results={results} picture={digest(data)}".encode()
    if data.startswith(_SIGNATURE):
        body = b"tEXt" + _KEYWORD + line
        chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
        return data[:_HEADER_END] + chunk + data[_HEADER_END:]
    if data.rstrip().endswith(b"</svg>"):
        return data + _SVG_BEGIN + line + _SVG_END
    raise ValueError(f"data must be a PNG or an SVG, got {data[:16]!r}")


def fault(data: bytes, results: str) -> str | None:
    """Say what is wrong with a picture that should be drawn from ``results``; None if nothing."""
    plain, line = _split(data)
    if line is None:
        return "does not say what it was drawn from"
    said = dict(item.partition("=")[::2] for item in line.decode().split())
    if said.get("results") != results:
        return "was drawn from other results, or by other code"
    if said.get("picture") != digest(plain):
        return "was changed after it was drawn"
    return None


def _split(data: bytes) -> tuple[bytes, bytes | None]:
    """The picture as it was before ``stamp``, and the line."""
    begin = _HEADER_END + 8
    if data.startswith(_SIGNATURE) and data[begin - 4 : begin] == b"tEXt":
        end = begin + int.from_bytes(data[_HEADER_END : _HEADER_END + 4], "big")
        if data[begin:end].startswith(_KEYWORD):
            plain = data[:_HEADER_END] + data[end + 4 :]
            return plain, data[begin + len(_KEYWORD) : end]
    if data.endswith(_SVG_END) and _SVG_BEGIN in data:
        plain, line = data.rsplit(_SVG_BEGIN, 1)
        return plain, line.removesuffix(_SVG_END)
    return data, None
