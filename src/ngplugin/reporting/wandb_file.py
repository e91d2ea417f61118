"""Reads the file that wandb writes when it is offline.

It is a header of seven bytes, then blocks of 32 KiB with pieces of records in them, as in LevelDB's
log: CRC (4 bytes), length (2), type (1: whole, 2: first, 3: middle, 4: last piece), data. A record
is a protocol buffer of wandb's own.

Source: https://github.com/google/leveldb/blob/main/doc/log_format.md.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_HEADER, _BLOCK, _PIECE = 7, 32 * 1024, 7
_WHOLE, _FIRST, _LAST = 1, 2, 4


def read(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a run's history and its config, by name.

    A value of a row is a number or text, or a dict of what wandb keeps of a histogram, table or
    image.

    Args:
        path: of the file; one that is being written, or was cut off, is read as far as it goes.

    Raises:
        ImportError: wandb is not installed.
    """
    from wandb.proto import wandb_internal_pb2

    config: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            rows.append(_nested(record.history.item))
        elif kind in ("config", "run"):
            config |= _nested((record.config if kind == "config" else record.run.config).update)
    return rows, config


def records(content: bytes) -> Iterator[bytes]:
    """The records of a file, put together of their pieces."""
    at, pieces = _HEADER, b""
    while at + _PIECE <= len(content):
        room = _BLOCK - at % _BLOCK
        if room < _PIECE:  # nothing begins in the last bytes of a block
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        data = content[at + _PIECE : at + _PIECE + length]
        if kind == 0 or len(data) < length:
            return
        pieces = data if kind in (_WHOLE, _FIRST) else pieces + data
        if kind in (_WHOLE, _LAST):
            yield pieces
        at += _PIECE + length


def _nested(items: Iterable[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        name, *below = item.nested_key or [item.key]
        if below:
            found.setdefault(name, {})["/".join(below)] = json.loads(item.value_json)
        else:
            found[name] = json.loads(item.value_json)
    return found
