"""Which files of a data set's repository are a split of a configuration, told by names and the card alone.

Covered: `configs` in the card's YAML; without it folders and files named after splits, a folder a configuration, and
the Hub's own Parquet copies (<config>/<split>/0000.parquet). Patterns are found by `datasets`' own functions, in a file
system in memory that has the repository's names and nothing else.
Not covered: rows made by a script, files elsewhere, and what a card says of how to read a file (`sep`, `names`).
"""

import glob
import posixpath
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from prefbuild.errors import LockError

ROWS = (".jsonl", ".json", ".parquet", ".csv")
ABOUT_DATA = ("dataset_infos.json", "dataset_info.json")  # beside the rows, and no rows
SHARD = re.compile(r"[-_]?\d+(-of-\d+)?(?=\.[a-z]+$)")
CONVERTED = re.compile(r"[^/]+/[^/]+/\d{4}\.parquet")
MOST = 12  # names in a message


@dataclass(frozen=True, kw_only=True)
class Config:
    """A configuration: patterns by split, below the folder `base` (`` or `name/`). No splits: names tell none."""

    base: str
    splits: dict[str, list[str]]


def rows_of(paths: list[str]) -> list[str]:
    """The files of rows among a repository's, sorted; none that is hidden."""
    rows = [path for path in paths if path.endswith(ROWS) and not path.endswith(ABOUT_DATA)]
    return sorted(path for path in rows if not any(part.startswith((".", "__")) for part in path.split("/")))


def sets_of(paths: list[str]) -> list[str]:
    """The first file of each set of rows: shards of one set differ in their numbers only."""
    return sorted({SHARD.sub("", path): path for path in sorted(paths, reverse=True)}.values())


def choose(paths: list[str], card: dict[str, Any], config: str | None, split: str | None, where: str) -> list[str]:
    """The files of a configuration's split; its default configuration and only split where None.

    `card` is what the card's YAML says. LockError, naming `where`, lists what there is.
    """
    rows = rows_of(paths)
    configs, default = _configs(rows, card, where)
    there = f"there are {_listed(configs)}"
    name = config or default
    if name is None:
        raise LockError(f"{where}: has several configs; say which, as in config: {min(configs)}; {there}")
    if name not in configs:
        raise LockError(f"{where}: has no config {name}; {there}")
    base, splits = configs[name].base, configs[name].splits
    if not splits:
        raise LockError(f"{where}: the names of config {name} tell no splits; name the files, with files: [...]")
    if split is None and len(splits) > 1:
        raise LockError(f"{where}: has several splits; say which, as in split: {min(splits)}; {there}")
    asked = split or min(splits)
    if asked not in splits:
        raise LockError(f"{where}: has no split {asked} in config {name}; {there}")
    found = {base + path for pattern in splits[asked] for path in _matching(_below(rows, base), pattern, where)}
    if not found:
        patterns = ", ".join(splits[asked][:MOST])
        raise LockError(
            f"{where}: split {asked} of config {name} is {patterns}, and no such file of rows is there; "
            "name the files, with files: [...]"
        )
    return sorted(found)


def listing(paths: list[str], card: dict[str, Any], where: str) -> str:
    """The configurations and splits in words, `` when names tell none. LockError when the card can't be read."""
    configs, _ = _configs(rows_of(paths), card, where)
    return _listed(configs) if any(config.splits for config in configs.values()) else ""


def _listed(configs: dict[str, Config]) -> str:
    words = [f"{name} ({', '.join(list(config.splits)[:MOST]) or 'no splits'})" for name, config in configs.items()]
    return ", ".join(words[:MOST]) + (f" and {len(words) - MOST} more" if len(words) > MOST else "")


def _configs(rows: list[str], card: dict[str, Any], where: str) -> tuple[dict[str, Config], str | None]:
    """The configurations by name, and the name of the default one, if one is."""
    if card.get("configs"):
        return _by_card(rows, card["configs"], where)
    inside = "data/" if all(path.startswith("data/") for path in rows) else ""
    tops = sorted({path.removeprefix(inside).rpartition("/")[0].split("/")[0] for path in rows})
    if rows and all(CONVERTED.fullmatch(path) for path in rows):
        configs = {top: Config(base=f"{top}/", splits=_by_folder(_below(rows, f"{top}/"))) for top in tops}
    elif all(top and not _says_split(top) for top in tops):
        bases = {top: f"{inside}{top}/" for top in tops}
        configs = {top: Config(base=base, splits=_by_names(_below(rows, base))) for top, base in bases.items()}
    else:
        configs = {"default": Config(base="", splits=_by_names(rows))}
    default = next(iter(configs)) if len(configs) == 1 else "default" if "default" in configs else None
    return configs, default


def _by_card(rows: list[str], said: Any, where: str) -> tuple[dict[str, Config], str | None]:
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs

    try:
        # Without `features`, which may be of types that this version does not know, and with names as recipes have them.
        known = ("data_files", "data_dir", "default")
        wanted = [
            {"config_name": str(one["config_name"]), **{key: one[key] for key in known if key in one}} for one in said
        ]
        checked: Any = MetadataConfigs.from_dataset_card_data({"configs": wanted})
        configs = {}
        for name, one in checked.items():
            folder = posixpath.normpath(one.get("data_dir") or ".").strip("/")
            base, files = "" if folder == "." else f"{folder}/", one.get("data_files")
            splits = _by_names(_below(rows, base)) if files is None else sanitize_patterns(files)
            configs[name] = Config(base=base, splits=splits)
        return configs, checked.get_default_config_name()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        why = " ".join(str(error).split())[:200]
        raise LockError(
            f"{where}: `configs` in its card can't be read ({why}); name the files, with files: [...]"
        ) from None


def _by_folder(rows: list[str]) -> dict[str, list[str]]:
    return {split: [f"{glob.escape(split)}/*"] for split in sorted({path.partition("/")[0] for path in rows})}


def _by_names(rows: list[str]) -> dict[str, list[str]]:
    """Patterns by split, as names of files and folders tell; none when they don't and there are several sets."""
    from datasets.data_files import DEFAULT_PATTERNS_ALL, get_data_patterns

    if not rows:
        return {}
    with _in_memory(rows) as root:
        patterns = get_data_patterns(root)
    if patterns == DEFAULT_PATTERNS_ALL and len(sets_of(rows)) > 1:
        return {}
    return {str(split): patterns[split] for split in patterns}


def _says_split(folder: str) -> bool:
    """Whether `datasets` takes a folder's name for a split's."""
    from datasets.data_files import DEFAULT_PATTERNS_ALL, get_data_patterns

    with _in_memory([f"{folder}/x.jsonl"]) as root:
        return get_data_patterns(root) != DEFAULT_PATTERNS_ALL


def _matching(rows: list[str], pattern: str, where: str) -> list[str]:
    from datasets.data_files import resolve_pattern

    if urlsplit(pattern).scheme or pattern.startswith("/") or "::" in pattern:
        raise LockError(
            f"{where}: its card names {pattern}, which is no file of the repository; name the files, with files: [...]"
        )
    with _in_memory(rows) as root:
        try:
            found = resolve_pattern(pattern.removeprefix("./"), root)
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise LockError(
                f"{where}: its card's pattern {pattern} can't be read ({error}); name the files, with files: [...]"
            ) from None
        return [path.partition(f"/{root.partition('://')[2]}/")[2] for path in found]


def _below(rows: list[str], base: str) -> list[str]:
    return [path.removeprefix(base) for path in rows if path.startswith(base)]


@contextmanager
def _in_memory(rows: list[str]) -> Iterator[str]:
    """The address of a file system in memory with empty files of these names."""
    import fsspec

    memory, folder = fsspec.filesystem("memory"), uuid.uuid4().hex
    for path in rows:
        memory.pipe_file(f"/{folder}/{path}", b"")
    try:
        yield f"memory://{folder}"
    finally:
        if rows:
            memory.rm(f"/{folder}", recursive=True)
