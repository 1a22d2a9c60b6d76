"""The folder of a prediction: one result after another, each whole, and a list by which the same command goes on.

``results.jsonl`` begins with a line on the model and its options; every further line is a finished input.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmask.errors import UserError

LIST = "results.jsonl"
OVERLAY = ".overlay.png"


@dataclass
class Saved:
    """A result that an earlier call wrote: ``values`` is what it said of itself, ``file`` its JSON."""

    values: dict[str, Any]
    file: Path
    said: str = ""
    kind: str = field(default="saved", init=False)

    def plain(self) -> dict[str, Any]:
        return self.values

    def words(self) -> str:
        return self.said


class Answers:
    """Results in a folder.

    made_by: the model, its weights' digest and the options, JSON-able: another one's results are not mixed with these.
    Raises ``UserError`` where the folder holds another model's answers, or files that would be written over.
    """

    def __init__(self, folder: Path, made_by: Mapping[str, Any]):
        self.folder, self.list = folder, folder / LIST
        self.made_by = json.loads(json.dumps(dict(made_by), default=str))
        self.done: dict[str, dict[str, Any]] = {}
        self.names: dict[int, str] = {}
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file: choose another --out")
        if self.list.is_file():
            self._read()

    def _read(self) -> None:
        lines = self.list.read_text(encoding="utf-8").splitlines()
        try:
            rows = [json.loads(line) for line in lines if line.endswith("}")]
        except ValueError:
            raise UserError(f"{self.list} is damaged: choose another --out") from None
        head = rows[0].get("made_by") if rows else None
        if head != self.made_by:
            differing = _difference(head or {}, self.made_by)
            raise UserError(f"{self.folder} holds results of another question ({differing}): choose another --out")
        self.done = {row["input"]: row for row in rows[1:]}

    # --- names ---
    def plan(self, inputs: Sequence[Any]) -> list[int]:
        """Give every input its name, and return the places of those that are still to do. Raises ``UserError`` before anything is
        written."""
        taken = {row["name"] for row in self.done.values()}
        todo = []
        for place, item in enumerate(inputs):
            row = self.done.get(key(item, place))
            if row is not None and not isinstance(item, (str, Path)):
                raise UserError(f"{self.folder} holds {row['name']} already: choose another --out")
            if row is not None and row["stamp"] == stamp(item) and (self.folder / f"{row['name']}.json").is_file():
                self.names[place] = row["name"]
                continue
            name = row["name"] if row is not None else _free(item, place, taken)
            if row is None:
                self._refuse_written(name)
            taken.add(name)
            self.names[place] = name
            todo.append(place)
        return todo

    def _refuse_written(self, name: str) -> None:
        """Nothing of somebody else's may be written over."""
        if not self.folder.is_dir():
            return
        for ending in (".json", ".png", ".npy", OVERLAY):
            if (self.folder / f"{name}{ending}").exists() and not self._half_done(name):
                raise UserError(
                    f"{self.folder} holds {name}{ending}, which would be written over: choose another --out"
                )

    def _half_done(self, name: str) -> bool:
        """A result that was written, but whose line was not: only in a folder of ours."""
        return self.list.is_file() and (self.folder / f"{name}.json").is_file()

    def begin(self) -> None:
        """Make the folder and its list."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.list.is_file():
                self._append({"format": 1, "made_by": self.made_by})
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}: choose another --out") from None

    # --- results ---
    def saved(self, item: Any, place: int) -> Saved:
        """What is there already of an input."""
        row = self.done[key(item, place)]
        file = self.folder / f"{row['name']}.json"
        return Saved(json.loads(file.read_text(encoding="utf-8")), file, row.get("words", ""))

    def write(self, item: Any, place: int, result: Any, *, overlay: bool, said: str) -> Path:
        """Save one result, its overlay if it can be seen, and its line. Returns the JSON file."""
        path = self.folder / self.names[place]
        if overlay:
            self._overlay(result, path)
        file = result.save(path)
        row: dict[str, Any] = {
            "input": key(item, place),
            "stamp": stamp(item),
            "name": self.names[place],
            "words": said,
        }
        self.done[row["input"]] = row
        try:
            self._append({**row, "kind": getattr(result, "kind", "result")})
        except OSError as error:
            raise UserError(f"cannot write to {self.list}: {error.strerror}") from None
        return Path(file)

    def _overlay(self, result: Any, path: Path) -> None:
        from unmask.systems.prediction.result import drawn

        content = drawn(result)
        if content is not None:
            from unmask.systems.prediction.result import write_whole

            write_whole(path.with_name(path.name + OVERLAY), content)

    def _append(self, row: Mapping[str, Any]) -> None:
        with self.list.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def key(item: Any, place: int) -> str:
    """What an input is known by: its path, or its number."""
    return str(Path(item).resolve()) if isinstance(item, (str, Path)) else f"input {place}"


def stamp(item: Any) -> list[int] | None:
    """Changes when a file does."""
    if not isinstance(item, (str, Path)) or not Path(item).exists():
        return None
    status = Path(item).stat()
    return [status.st_size, status.st_mtime_ns]


def _free(item: Any, place: int, taken: set[str]) -> str:
    """The file's name; where two have it, with its folder's, its ending's, or a number."""
    if not isinstance(item, (str, Path)):
        return f"input-{place}"
    path = Path(item)
    parent = path.resolve().parent.name
    for name in (path.stem, f"{parent}-{path.stem}", f"{parent}-{path.stem}-{path.suffix.lstrip('.')}"):
        if name not in taken:
            return name
    number = 2
    while f"{parent}-{path.stem}-{number}" in taken:
        number += 1
    return f"{parent}-{path.stem}-{number}"


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    for name in new:
        if old.get(name) != new[name]:
            if name == "weights":
                return "the model has other weights now"
            if isinstance(new[name], dict) and isinstance(old.get(name), dict):
                return _difference(old[name], new[name])
            return f"{name}={old.get(name)}, now {new[name]}"
    return "made otherwise"
