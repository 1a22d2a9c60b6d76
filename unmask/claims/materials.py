"""The data that claims name, found on this machine: under ``$UNMASK_DATA``, or in a folder ``shared/data`` beside us.

Besides what ``data.open`` takes, a claim may name ``NAME`` for ``NAME-train.parquet`` there, or a file there by its whole
name; ``camvid`` for the zip of street scenes, and ``A+B+C`` for several sets of images as one, without labels.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from unmask.errors import UserError

SCENES = "camvid_240x320.zip"


def data_folder() -> Path | None:
    """The folder of data sets: ``$UNMASK_DATA``, else ``shared/data`` beside the repository or the present folder."""
    named = os.environ.get("UNMASK_DATA", "").strip()
    if named:
        return Path(named).expanduser()
    here = Path(__file__).resolve().parents[2]
    places = (here.parent, Path.cwd(), Path.cwd().parent)
    return next((p / "shared" / "data" for p in places if (p / "shared" / "data").is_dir()), None)


def find_data(uris: Iterable[str], work: Path) -> dict[str, str]:
    """What each URI of a claim is for ``data.open``; joined sets are written to ``work`` once.

    Sets ``UNMASK_DATA`` where it was unset and the data were found beside us, so that names are found everywhere.
    Raises ``UserError`` in one line naming everything that is missing, before anything is trained.
    """
    folder = data_folder()
    if folder is not None and not os.environ.get("UNMASK_DATA", "").strip():
        os.environ["UNMASK_DATA"] = str(folder)
    found, missing = {}, []
    for uri in dict.fromkeys(uris):
        parts = uri.split("+")
        lacking = [p for p in parts if not (known(p) or local(p, folder))]
        missing += lacking
        if not lacking:
            found[uri] = (
                joined(parts, folder, work) if len(parts) > 1 else uri if known(uri) else str(local(uri, folder))
            )
    if missing:
        where = f"under UNMASK_DATA={folder}" if folder is not None else "(UNMASK_DATA is not set)"
        names = ", ".join(dict.fromkeys(missing))
        raise UserError(f"data missing: {names}, not found {where}: set UNMASK_DATA to the folder that holds them")
    return found


def known(uri: str) -> bool:
    """Whether ``data.open`` takes it as it stands."""
    from unmask.data.names import KNOWN

    return uri in KNOWN or ":" in uri or "/" in uri or Path(uri).exists()


def local(name: str, folder: Path | None) -> Path | None:
    """The file of a data set in the folder, None where it is not there."""
    if folder is None:
        return None
    candidates = (
        [folder / SCENES]
        if name == "camvid"
        else [folder / f"{name}-train.parquet", folder / f"{name}.parquet", folder / name]
    )
    return next((c for c in candidates if c.is_file()), None)


def joined(names: list[str], folder: Path | None, work: Path) -> str:
    """One parquet file with the training images of several sets, in order, bytes untouched."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = [local(n, folder) or Path(n) for n in names]
    facts = "\n".join(f"{f} {f.stat().st_size}" for f in files)
    path = work / "data" / f"{'+'.join(f.stem.split('-')[0] for f in files)}-{short(facts)}.parquet"
    if not path.exists():
        rows = [{"bytes": data, "path": name} for file in files for name, data in images_of(file)]
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".aside")
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        pq.write_table(pa.table({"image": pa.array(rows, type=kind)}), aside)
        aside.replace(path)
    return str(path)


def images_of(file: Path) -> Iterator[tuple[str, bytes]]:
    """Names and encoded bytes of a parquet file's images, or of an archive's ``train/images``."""
    import pyarrow.parquet as pq

    if file.suffix == ".zip":
        with zipfile.ZipFile(file) as archive:
            for name in sorted(n for n in archive.namelist() if n.startswith("train/images/") and not n.endswith("/")):
                yield name, archive.read(name)
        return
    for row in pq.read_table(file, columns=["image"])["image"].to_pylist():
        yield row["path"] or "", row["bytes"]


def short(text: str) -> str:
    """Ten letters that stand for a text."""
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
