"""``unmask.data.open``: what a URI names, found and opened."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Mapping
from pathlib import Path

from unmask.data.settings import DataSettings
from unmask.data.source import Source, limited, read_split, sliced
from unmask.errors import UserError, nearest

LEARN, HOLD = "train[:80%]", "train[80%:]"  # what stands for train and test where there is no test split
SAMPLES = ("sample:fashion", "sample:photos", "sample:photos@128", "sample:photos@224")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?$")


def open_source(
    uri: str | Path,
    split: str = "train",
    *,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    cache: bool = True,
    workers: int | None = None,
) -> Source:
    """One split of a data set.

    uri: a folder of images; a parquet file or folder; ``shards/*.tar`` (WebDataset, streaming); a name such as
    ``cifar10``; a hub id ``owner/name`` (``owner/name:config``); ``sample:fashion``; ``sample:photos``.
    split: "train", "test" (also found as val, validation, valid, dev), or a share "train[:80%]" in a fixed shuffled
    order. columns: names of the image and label columns where they differ. limit: at most so many, a fixed random choice.
    Raises ``UserError`` in one line for whatever is missing, empty or unreadable.
    """
    uri = str(uri)
    name, low, high = read_split(split)
    try:
        source = _opened(uri, name, dict(columns or {}))
    except OSError as error:  # no permission, a loop of links, a device that is gone
        raise UserError(f"{uri}: cannot be read: {error.strerror or error}") from None
    source.cached, source.workers = cache, workers
    if source.streaming:
        if low or high:
            raise UserError(f"split {split!r}: a share of shards cannot be taken; name other files")
        if limit is not None:
            raise UserError(f"limit={limit}: shards are read to their end; name fewer files")
        return source
    return limited(sliced(source, low, high), limit)


def from_settings(settings: DataSettings) -> Source:
    """The source that the settings name."""
    s = settings
    return open_source(s.uri, s.split, columns=s.columns, limit=s.limit, cache=s.cache, workers=s.workers)


def train_and_test(uri: str | Path, *, columns: Mapping[str, str] | None = None) -> tuple[Source, Source]:
    """The training and the test split; where there is no test split, the shares ``LEARN`` and ``HOLD``, and the sources'
    ``split`` says so."""
    test = own_test(uri, columns=columns)
    if test is not None:
        return open_source(uri, "train", columns=columns), test
    return open_source(uri, LEARN, columns=columns), open_source(uri, HOLD, columns=columns)


def own_test(uri: str | Path, *, columns: Mapping[str, str] | None = None) -> Source | None:
    """The data's own test split, or None where it has none."""
    try:
        return open_source(uri, "test", columns=columns)
    except UserError as error:
        if "no split 'test'" not in str(error):
            raise
    return None


def _opened(uri: str, split: str, columns: dict[str, str]) -> Source:
    if not uri.strip():
        raise UserError("no data named: it takes a folder, a parquet file, shards/*.tar, a name or sample:fashion")
    if uri.startswith("sample:"):
        return _sample(uri, split)
    if uri.startswith("hf:"):
        from unmask.data.tables import open_hub

        return open_hub(uri, uri.removeprefix("hf:").lstrip("/"), split, columns)
    path = Path(uri).expanduser()
    if any(c in uri for c in "*?[") and not path.exists():
        return _pattern(uri, split, columns)
    if path.exists():
        return _path(uri, path, split, columns)
    from unmask.data import names

    if uri in names.KNOWN:
        return names.open_name(uri, split, columns)
    if _HUB_ID.match(uri) and path.suffix.lower() not in {".parquet", ".tar", ".zip"}:
        from unmask.data.tables import open_hub

        return open_hub(uri, uri, split, columns)
    raise UserError(f"no file, folder or data set {uri!r}: {_guess(uri, path)}")


def _sample(uri: str, split: str) -> Source:
    if uri == "sample:fashion":
        from unmask.data.tables import open_parquet

        return open_parquet(uri, Path(__file__).parent / "samples" / "fashion-train.parquet", split, {})
    if uri.startswith("sample:photos"):
        from unmask.data.photos import open_photos

        return open_photos(uri, split)
    raise UserError(f"no sample {uri!r}: {nearest(uri, SAMPLES)}")


def _path(uri: str, path: Path, split: str, columns: dict[str, str]) -> Source:
    from unmask.data.tables import open_parquet

    if path.is_dir():
        if not any(path.iterdir()):
            raise UserError(f"{uri} is an empty folder")
        if any(path.rglob("*.parquet")) and not _has_image(path):
            return open_parquet(uri, path, split, columns)
        if any(path.rglob("*.tar")) and not _has_image(path):
            from unmask.data.shards import open_shards

            return open_shards(uri, sorted(path.rglob("*.tar")), split, columns)
        from unmask.data.folder import open_folder

        return open_folder(uri, path, split)
    if path.suffix.lower() == ".parquet":
        return open_parquet(uri, path, split, columns)
    if path.suffix.lower() == ".tar":
        from unmask.data.shards import open_shards

        return open_shards(uri, [path], split, columns)
    if path.suffix.lower() == ".zip":
        raise UserError(f"{uri} is an archive: unpack it and name the folder")
    raise UserError(f"{uri} is a single file: it takes a folder of images, a .parquet file or .tar shards")


def _has_image(folder: Path) -> bool:
    from unmask.data.decode import is_image

    return any(is_image(p) for p in folder.rglob("*"))


def _pattern(uri: str, split: str, columns: dict[str, str]) -> Source:
    files = sorted(Path(p) for p in glob.glob(str(Path(uri).expanduser()), recursive=True))
    if not files:
        raise UserError(f"no file matches {uri!r}")
    if all(f.suffix == ".tar" for f in files):
        from unmask.data.shards import open_shards

        return open_shards(uri, files, split, columns)
    raise UserError(f"{uri!r} matches {files[0]}: a pattern takes .tar shards; name a folder for images or parquet")


def _guess(uri: str, path: Path) -> str:
    from unmask.data import names

    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = [str(path.parent / name) for name in difflib.get_close_matches(path.name, beside, n=3, cutoff=0.5)]
    if "/" not in uri:
        return nearest(uri, [*names.KNOWN, *SAMPLES, *close])
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"nothing in {path.parent} has such a name" if beside else f"there is no folder {path.parent}"
