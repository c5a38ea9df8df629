"""``metrics.jsonl``: what a training logs, one line per logged step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Metrics:
    """``metrics.jsonl``: one line per logged step; on resume, lines behind the checkpoint are cut off."""

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept: list[str] = []
        if path.exists() and step > 0:
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] > step:
                        break
                except ValueError:  # a line cut short by a kill
                    break
                kept.append(line)
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
