"""The parquet files of a dataset on the hub, read where they are."""

from __future__ import annotations

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

CONVERTED = "refs/convert/parquet"
"""The branch on which the hub keeps a parquet copy of a dataset in another format."""


def hub_files(hub: str, subset: str | None, split: str) -> list[str]:
    """The addresses of a split's parquet files: the dataset's own, or else the hub's copy of them.

    Raises ValueError for a subset or split that the dataset has not, and without a network.
    """
    try:
        own = own_files(hub, subset, split)
        if own:
            return own
        system, root = url_to_fs(f"hf://datasets/{hub}@{CONVERTED}")
        return [system.unstrip_protocol(path) for path in copied_files(system, root, subset, split)]
    except ValueError as error:
        raise ValueError(f"{hub}: {_line(error)}") from None
    except Exception as error:  # the hub's client raises dozens of kinds
        raise ValueError(
            f"{hub}: not to be had from the hub ({type(error).__name__}: {_line(error)}); with "
            f"`hf download --repo-type dataset {hub} --local-dir FOLDER`, and path=FOLDER in "
            "place of hub=, no network is needed"
        ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def own_files(hub: str, subset: str | None, split: str) -> list[str]:
    """The files of a split as the dataset's card or folders name them; none if not all parquet.

    Raises ValueError for a subset or a split that the dataset has not.
    """
    from datasets import load_dataset_builder

    files = load_dataset_builder(hub, subset).config.data_files or {}
    if files and split not in files:
        raise ValueError(f"no split {split!r}; it has: {', '.join(map(str, files))}")
    addresses = sorted(map(str, files.get(split, [])))
    return addresses if all(each.endswith(".parquet") for each in addresses) else []


def copied_files(
    system: AbstractFileSystem, root: str, subset: str | None, split: str
) -> list[str]:
    """The paths of a split's parquet files below `root`, by folders of subset and split.

    Raises ValueError for a subset or a split that is not there.
    """
    subsets = _folders(system, root)
    if subset is None and len(subsets) == 1:
        (subset,) = subsets
    if subset not in subsets:
        raise ValueError(f"no subset {subset!r}; it has: {', '.join(subsets)}")
    splits = _folders(system, subsets[subset])
    if split not in splits:
        raise ValueError(f"no split {split!r}; it has: {', '.join(splits)}")
    return sorted(system.glob(f"{splits[split]}/*.parquet"))


def _folders(system: AbstractFileSystem, path: str) -> dict[str, str]:
    """The paths of the folders in a folder, by their names."""
    found = [each["name"].rstrip("/") for each in system.ls(path) if each["type"] == "directory"]
    return {name.rpartition("/")[2]: name for name in sorted(found)}
