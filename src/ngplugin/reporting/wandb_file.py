"""Reads the file that wandb writes when it is offline.

It is a header of seven bytes, then blocks of 32 KiB with pieces of records in them, as in LevelDB's
log: CRC (4 bytes), length (2), type (1: whole, 2: first, 3: middle, 4: last piece), data. A record
is a protocol buffer of wandb's own.

Source: https://github.com/google/leveldb/blob/main/doc/log_format.md.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER, _BLOCK, _PIECE = 7, 32 * 1024, 7
_WHOLE, _FIRST, _LAST = 1, 2, 4


def read(path: Path) -> tuple[Iterator[tuple[int, dict[str, float]]], dict[str, Any]]:
    """The rows of a run's history, each with its step, and its config.

    Args:
        path: of the file; one that is being written, or was cut off, is read as far as it goes.

    Raises:
        ImportError: wandb is not installed.
    """
    from wandb.proto import wandb_internal_pb2

    config: dict[str, Any] = {}
    rows: list[tuple[int, dict[str, float]]] = []
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row = {_key(item): json.loads(item.value_json) for item in record.history.item}
            numbers = {
                name: float(value) for name, value in row.items() if isinstance(value, (int, float))
            }
            step = numbers.pop("trainer/global_step", numbers.get("_step", 0.0))
            rows.append((int(step), {n: v for n, v in numbers.items() if not n.startswith("_")}))
        elif kind in ("config", "run"):
            changed = record.config if kind == "config" else record.run.config
            config.update({_key(item): json.loads(item.value_json) for item in changed.update})
    return iter(rows), config


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


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)
