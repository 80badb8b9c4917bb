"""Sizes in bytes and large numbers that users write with a unit."""

from __future__ import annotations

import re


UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}

_COUNT = re.compile(r"(\d+(?:\.\d+)?)([KMB]?)", re.IGNORECASE)
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def count_of(text: str) -> int | None:
    """Return the number that a text such as `"500K"`, `"1.5M"`, `"7B"` or `"250,000"` stands for, with 1,000 for K;
    `None` where it is no such number."""
    matched = _COUNT.fullmatch(text.strip().replace("_", "").replace(",", ""))
    return None if matched is None else round(float(matched[1]) * _FACTORS[matched[2].upper()])


def bytes_of(size: str) -> int:
    """Return the number of bytes that a size stands for, such as `"6GB"` (10⁹ bytes each), `"512 MiB"`, `"1e9"` or
    `"6,000,000,000"`.

    Raises:
        ValueError: where it is no size.
    """
    plain = size.replace("_", "").replace(",", "")
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([a-z]*)\s*", plain, flags=re.IGNORECASE)
    try:
        if match is None:
            raise ValueError
        return round(float(match[1]) * UNITS[match[2].upper()])
    except (KeyError, ValueError):
        raise ValueError(f"{size!r} is no size in bytes; write 6GB, 500MB, 2GiB or a number of bytes.") from None
