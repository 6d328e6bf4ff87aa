"""Compare two recipes, or a recipe at two git revisions, side by side: settings, data, metrics, gates.

Read offline: what git tracks from git, results from disk or from DVC's local cache. Covered: a change of a measured
metric is held against noise by a paired test, where both sides measured the same documents in the same way. Not
covered: results on disk are taken as they are; those made with other settings than the resolved recipe's are noted.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from prefbuild.compare import compare_samples
from prefbuild.errors import StageError, UsageError
from prefbuild.report.page import SURE, flatten, significance
from prefbuild.resolve import RESOLVED
from prefbuild.yamlfile import printable, show

HERE = "working tree"
STAGES = ("prepare", "reference", "train", "merge", "evaluate", "gate", "promote")
# As a recipe spells them; of the others the stage's name comes first.
SPELLED = ("data", "train", "merge", "gates", "promote", "base", "seed", "description")
ABSENT = object()

Paint = Callable[[str, str], str]  # (text, ANSI code)


@dataclass
class _Tree:
    """The project's files: those on disk, or those of one git revision."""

    root: Path
    label: str  # as the user named it
    commit: str | None = None  # None: on disk
    unbuilt: list[str] = field(default_factory=list)  # what was asked for in vain
    uncached: dict[str, str] = field(default_factory=dict)  # and what DVC would have to fetch for it
    _files: Any = None  # DVCFileSystem, opened when first needed
    _prefix: str = ""  # of the project in its git repository

    def tracked(self, path: str) -> bytes | None:
        """A file that git tracks; None when it is not there."""
        if self.commit is None:
            file = self.root / path
            return file.read_bytes() if file.is_file() else None
        shown = _git(self.root, "show", f"{self.commit}:./{path}")
        return shown.stdout if shown.returncode == 0 else None

    def result(self, path: str) -> bytes | None:
        """A file that DVC keeps; None, and noted, when it is not there."""
        if self.commit is None:
            file = self.root / path
            if file.is_file():
                return file.read_bytes()
            self.unbuilt.append(path)
            return None
        from dvc_data.index import DataIndexDirError

        files = self._open()
        place = self._prefix + path
        try:
            data: bytes = files.read_bytes(place)
            return data
        except DataIndexDirError:  # the cache lacks the list of the folder's files
            self.uncached[path] = path.rpartition("/")[0]
        except FileNotFoundError:
            # An output that was never made is listed too, without a digest.
            if files.exists(place) and files.info(place).get("md5"):
                self.uncached[path] = path
            else:
                self.unbuilt.append(path)
        return None

    def notes(self) -> list[str]:
        """What was asked for in vain, and how to get it; then forgotten."""
        notes = []
        if self.unbuilt and self.commit is None:
            notes.append(f"not there: {', '.join(self.unbuilt)}; `dvc repro` makes and `dvc checkout` restores them")
        elif self.unbuilt:
            notes.append(f"not built in {self.label}: {', '.join(self.unbuilt)}")
        if self.uncached:
            targets = " ".join(dict.fromkeys(self.uncached.values()))
            notes.append(
                f"not in DVC's cache here: {', '.join(self.uncached)} of {self.label}; run `dvc fetch --all-commits {targets}`"
            )
        self.unbuilt.clear()
        self.uncached.clear()
        return notes

    def recipes(self) -> list[str]:
        """Names of the recipes that are resolved here."""
        if self.commit is None:
            files = [path.name for path in (self.root / RESOLVED).glob("*.json")]
        else:
            listed = _git(self.root, "ls-tree", "--name-only", "-z", self.commit, f"{RESOLVED}/")
            files = [path.rpartition("/")[2] for path in listed.stdout.decode().split("\0") if path.endswith(".json")]
        return sorted(file.removesuffix(".json") for file in files if file != "report.json")

    def _open(self) -> Any:
        if self._files is None:
            from dvc.api import DVCFileSystem
            from dvc.exceptions import DvcException
            from dvc.repo import Repo

            self._prefix = _git(self.root, "rev-parse", "--show-prefix").stdout.decode().strip("\n")
            offline = {"core": {"remote": ""}}  # a diff says what is missing instead of fetching it
            try:
                self._files = DVCFileSystem(
                    repo=str(self.root.resolve()),
                    rev=self.commit,
                    subrepos=bool(self._prefix),  # else DVC looks at the top of the git repository only
                    repo_factory=partial(Repo, config=offline),
                    config=offline,
                )
            except DvcException as error:
                raise StageError(f"{self.label}: DVC cannot read it: {error}") from None
        return self._files


@dataclass(frozen=True, kw_only=True)
class _Side:
    """One recipe in one tree."""

    tree: _Tree
    recipe: str

    def path(self, file: str) -> str:
        return f"build/{self.recipe}/{file}"

    def sections(self) -> dict[str, Any] | None:
        """The resolved recipe; None when there is none."""
        path = f"{RESOLVED}/{self.recipe}.json"
        return _parse(self.tree.tracked(path), path, self.tree)

    def metrics(self, stage: str) -> dict[str, Any]:
        """`<stage>.json` of the build; empty, and a note, when it is not there."""
        path = self.path(f"{stage}.json")
        return _parse(self.tree.result(path), path, self.tree) or {}


def diff(root: Path, a: str, b: str | None, name: str | None) -> str:
    """The comparison as text; with colours where stdout is a terminal. See diff_json for what a, b and name mean."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return render(diff_json(root, a, b, name), colour=colour)


def diff_json(root: Path, a: str, b: str | None, name: str | None) -> dict[str, Any]:
    """The comparison as plain data.

    `a` and `b` are recipes of the project as it is, or git revisions; a recipe and a revision compare the recipe as it
    is with itself at that revision. `b` is by default the working tree, and `name` the one recipe to compare between
    revisions. In the result `a` and `b` hold a value of each side, and a side that has none lacks the key:
        {"a", "b", "recipes": [{"name", "a", "b", "only_in"?, "settings": [row], "data": [row], "metrics": [row],
         "gates": {"a"?, "b"?, "rules": [row]}, "notes": [str]}]}
        row = {"name", "a"?, "b"?, "change"?, "says"?, "comparable"?, "p_value"?, "stderr"?, "n"?}

    Raises UsageError when a word is neither a recipe nor a revision.
    """
    pairs = _pairs(root, a, b, name)
    return {
        "a": pairs[0][0].tree.label if pairs[0][0].recipe == pairs[0][1].recipe else pairs[0][0].recipe,
        "b": pairs[0][1].tree.label if pairs[0][0].recipe == pairs[0][1].recipe else pairs[0][1].recipe,
        "recipes": [_compare(left, right) for left, right in pairs],
    }


# ---- what is compared


def _pairs(root: Path, a: str, b: str | None, name: str | None) -> list[tuple[_Side, _Side]]:
    here = _Tree(root=root, label=HERE)
    written = {path.stem for path in (root / "recipes").glob("*.y*ml")}
    recipes = sorted(written | set(here.recipes()))
    left = None if a in recipes else _tree(root, a, recipes)
    right = here if b is None else None if b in recipes else _tree(root, b, recipes)

    if left is None and b is None:
        raise UsageError(
            f"{a} is a recipe: name another one to compare it with, or a revision, as in `prefbuild diff HEAD {a}`"
        )
    if left is None and right is None:
        assert b is not None
        if name is not None:
            raise UsageError(f"--recipe {name} goes with revisions; {a} and {b} are recipes")
        for recipe in (a, b):
            if recipe not in here.recipes():
                raise UsageError(f"{RESOLVED}/{recipe}.json: is missing; run `prefbuild resolve`")
        return [(_Side(tree=here, recipe=a), _Side(tree=_Tree(root=root, label=HERE), recipe=b))]
    if left is None or right is None:
        recipe = a if left is None else str(b)
        if name not in (None, recipe):
            raise UsageError(f"--recipe {name} is not {recipe}; name one of them")
        name = recipe
    left, right = left or here, right or here
    known = sorted({*left.recipes(), *right.recipes()})
    where = f"in {left.label} or {right.label}"
    if name is not None and name not in known:
        raise UsageError(f"{name}: no such recipe {where}; {_close(name, known)}")
    if not known:
        raise UsageError(f"there are no resolved recipes {where}; run `prefbuild resolve` and commit {RESOLVED}")
    return [
        (_Side(tree=left, recipe=recipe), _Side(tree=right, recipe=recipe)) for recipe in ([name] if name else known)
    ]


def _tree(root: Path, revision: str, recipes: list[str]) -> _Tree:
    found = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found.returncode:
        listed = _git(root, "for-each-ref", "--format=%(refname:short)", "refs/heads", "refs/tags")
        known = [*recipes, "HEAD", *listed.stdout.decode().split()]
        raise UsageError(f"{printable(revision)}: is neither a recipe nor a git revision; {_close(revision, known)}")
    return _Tree(root=root, label=revision, commit=found.stdout.decode().strip())


def _close(word: str, known: list[str]) -> str:
    matches = get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(matches)}?" if matches else f"there are: {', '.join(known[:20]) or 'none'}"


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=False)
    except FileNotFoundError:
        raise UsageError("git is not installed, and revisions are git's") from None


def _parse(data: bytes | None, path: str, tree: _Tree) -> Any:
    if data is None:
        return None
    try:
        return json.loads(data)
    except ValueError as error:
        raise StageError(f"{path} of {tree.label}: is not JSON: {error}") from None


# ---- the comparison


def _compare(left: _Side, right: _Side) -> dict[str, Any]:
    same = left.recipe == right.recipe
    names = {"a": left.tree.label if same else left.recipe, "b": right.tree.label if same else right.recipe}
    result: dict[str, Any] = {"name": left.recipe if same else f"{left.recipe} and {right.recipe}", **names}
    ours, theirs = left.sections(), right.sections()
    if ours is None or theirs is None:
        return {**result, "only_in": "b" if ours is None else "a"}
    result["settings"] = _rows(_settings(ours), _settings(theirs))
    our_pins, their_pins = _pins(left, ours), _pins(right, theirs)
    for path in sorted(our_pins.keys() & their_pins.keys()):  # what only one side reads is told by its name
        result["settings"] += _rows(our_pins[path], their_pins[path])
    result["data"] = _numbers(left, right, "prepare", "")
    result["metrics"] = _numbers(left, right, "train", "train.") + _numbers(left, right, "merge", "merge.")
    if "evaluate" in ours and "evaluate" in theirs:  # a reward model is measured on no task
        result["metrics"] += _measured(left, right, _keys(ours), _keys(theirs))
    result["gates"] = _gates(left.metrics("gate"), right.metrics("gate"))
    stale = [*_stale(left, ours), *_stale(right, theirs)]
    result["notes"] = [*left.tree.notes(), *right.tree.notes(), *stale]
    return result


def _rows(ours: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    """What differs, in the order of the second."""
    names = [*theirs, *(name for name in ours if name not in theirs)]
    return [_row(name, ours, theirs) for name in names if ours.get(name, ABSENT) != theirs.get(name, ABSENT)]


def _numbers(left: _Side, right: _Side, stage: str, prefix: str) -> list[dict[str, Any]]:
    """What differs in <stage>.json; nothing when a side has none, which its notes say."""
    ours, theirs = flatten(left.metrics(stage), prefix), flatten(right.metrics(stage), prefix)
    return _rows(ours, theirs) if ours and theirs else []


def _row(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    row = {"name": name} | {side: values[name] for side, values in (("a", ours), ("b", theirs)) if name in values}
    if _is_number(row.get("a")) and _is_number(row.get("b")):
        row["change"] = row["b"] - row["a"]
    return row


def _settings(sections: dict[str, Any]) -> dict[str, Any]:
    """Every setting by the name a recipe gives it. Of inputs only what the recipe chose: its base and its data."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        section = sections.get(stage, {"settings": {}})
        for key, value in section["settings"].items():
            if stage == "reference" or (stage == "gate" and key != "gates"):
                continue  # train's and evaluate's, again
            # evaluate's seed is its own, the same for all recipes.
            spelled = key in SPELLED and (stage, key) != ("evaluate", "seed")
            name = "evaluate.tasks" if key == "measurements" else key if spelled else f"{stage}.{key}"
            name = "compute.strategy" if key == "strategy" else name
            found |= _leaves(name, value)
        if stage == "train":
            found["compute.gpus"] = section.get("gpus")
            found["compute.image"] = section.get("image")
        if "version" in section:
            found[f"{stage} (version of prefbuild's own stage)"] = section["version"]
    inputs = sections["prepare"]["inputs"]
    found["base"] = Path(inputs["model"]).name if inputs["model"].startswith("build/models/") else inputs["model"]
    found["data.sources"] = [Path(path).name for path in inputs["data"]]
    return found


def _pins(side: _Side, sections: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The sha256 the lock pins of every file of the base and of the data, by model or data set."""
    inputs = sections["prepare"]["inputs"]
    pins = {}
    for path in (inputs["model"], *inputs["data"]):
        kind = {"build/models": "model", "build/data": "data"}.get(path.rpartition("/")[0])
        if kind is not None:  # else the base is another recipe's model
            pinned = f"{RESOLVED}/{path.removeprefix('build/')}.json"
            section = _parse(side.tree.tracked(pinned), pinned, side.tree) or {kind: {"settings": {}}}
            files = section[kind]["settings"].get("files") or []
            pins[path] = {f"{Path(path).name}[{file['path']}].sha256": file["sha256"] for file in files}
    return pins


def _leaves(name: str, value: Any) -> dict[str, Any]:
    """Settings by dotted name; items of a list of mappings by what people call them."""
    found: dict[str, Any] = {}
    if isinstance(value, dict):
        for key, inner in value.items():
            if key != "key":  # a digest of the rest
                found |= _leaves(f"{name}.{key}", inner)
        return found
    if not isinstance(value, list) or not any(isinstance(item, dict) for item in value):
        return {name: value}
    for item in value:
        label = next((item[key] for key in ("name", "path", "metric", "column") if item.get(key)), "")
        if item.get("against", "base") != "base":
            label += f" against {item['against']}"
        unique, count = f"{name}[{label}]", 2
        while any(leaf.startswith(f"{unique}.") for leaf in found):
            unique, count = f"{name}[{label} #{count}]", count + 1
        found |= _leaves(unique, item)
    return found


def _keys(sections: dict[str, Any]) -> dict[str, str]:
    """Measurement keys by the task's name in evaluate.json: with the key where a task is measured in two ways."""
    measurements = sections["evaluate"]["settings"]["measurements"]
    names = [measurement["name"] for measurement in measurements]
    return {m["name"] if names.count(m["name"]) == 1 else f"{m['name']}-{m['key']}": m["key"] for m in measurements}


def _measured(left: _Side, right: _Side, our_keys: dict[str, str], their_keys: dict[str, str]) -> list[dict[str, Any]]:
    """A row for every metric of evaluate.json on either side, with what a paired test says of its change."""
    ours, theirs = left.metrics("evaluate"), right.metrics("evaluate")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for task in [*theirs, *(task for task in ours if task not in theirs)]:
            mine, yours = ours.get(task, {}), theirs.get(task, {})
            key = our_keys.get(task)
            comparable = key is not None and key == their_keys.get(task)
            both = comparable and task in ours and task in theirs
            folders = _samples(left, right, str(key), Path(scratch)) if both else None
            for metric in [*yours, *(metric for metric in mine if metric not in yours)]:
                if metric.endswith("_stderr") or (metric == "n" and mine.get("n") == yours.get("n")):
                    continue
                row = _row(metric, mine, yours) | {"name": f"evaluate.{task}.{metric}"}
                if "a" in row and "b" in row:
                    row["comparable"] = comparable
                    if not comparable:
                        row.pop("change", None)
                        row["says"] = "not comparable: measured with other settings"
                    elif metric != "n":
                        row |= _test(row, folders, str(key), metric)
                rows.append(row)
    return rows


def _samples(left: _Side, right: _Side, key: str, scratch: Path) -> tuple[Path, Path] | None:
    """Both sides' samples of a measurement as files; None when one lacks them."""
    folders = []
    for number, side in enumerate((left, right)):
        data = side.tree.result(side.path(f"evaluate/{key}.jsonl"))
        if data is None:
            return None
        folder = scratch / str(number)
        folder.mkdir(exist_ok=True)
        (folder / f"{key}.jsonl").write_bytes(data)
        folders.append(folder)
    return folders[0], folders[1]


def _test(row: dict[str, Any], folders: tuple[Path, Path] | None, key: str, metric: str) -> dict[str, Any]:
    """What is said of a change: p-value and standard error of the paired test, or why there is none."""
    if row["a"] == row["b"]:
        return {"says": "equal"}
    if folders is None:
        return {"says": "not tested: samples are missing"}
    first = [json.loads((folder / f"{key}.jsonl").read_text(encoding="utf-8").partition("\n")[0]) for folder in folders]
    if not all(metric in sample["metrics"] for sample in first):
        return {"says": "not tested: it is no mean of samples"}
    try:
        test = compare_samples(folders[1], folders[0], key, metric, SURE)
    except StageError as error:
        text = str(error).replace(f"{folders[0]}/", "a's ").replace(f"{folders[1]}/", "b's ")
        return {"comparable": False, "says": f"not comparable: {text}"}
    if not math.isclose(test.mean_difference, row["change"], rel_tol=1e-6, abs_tol=1e-9):
        return {"says": "not tested: it is no mean of samples"}
    return {"says": significance(test.p_value), "p_value": test.p_value, "stderr": test.stderr, "n": test.n}


def _gates(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Verdicts, and the rules whose verdicts differ or that only one side has."""
    verdicts = {side: gate["passed"] is True for side, gate in (("a", ours), ("b", theirs)) if gate}
    rules = _rows(_verdicts(ours), _verdicts(theirs)) if len(verdicts) == 2 else []
    return {**verdicts, "rules": rules}


def _verdicts(gate: dict[str, Any]) -> dict[str, bool]:
    verdicts: dict[str, bool] = {}
    for rule in gate.get("rules", []):
        bound = "" if rule["bound"] is None else f" {rule['bound']:g}"
        against = f" against {rule['against']}" if rule["against"] not in (None, "base") else ""
        text = rule["says"] if rule["metric"] == "artifact" else f"{rule['metric']} {rule['rule']}{bound}{against}"
        verdicts[text] = verdicts.get(text, True) and rule["passed"] is True
    return verdicts


def _stale(side: _Side, sections: dict[str, Any]) -> list[str]:
    """A note on every stage whose results were made with other settings than the resolved recipe has."""
    from ruamel.yaml import YAML  # DVC's own: PyYAML takes 1e-05 for a text

    text = side.tree.tracked(f"pipelines/{side.recipe}/dvc.lock")
    locked = (YAML(typ="safe").load(text.decode()) or {}).get("stages", {}) if text else {}
    changed = []
    for stage, section in sections.items():
        if stage == "compute":
            continue  # changes no result
        was = locked.get(stage, {}).get("params", {}).get(f"{RESOLVED}/{side.recipe}.json", {}).get(stage, ABSENT)
        if was is not ABSENT and was != section:
            changed.append(stage)
    if not changed:
        return []
    return [f"{side.recipe} in {side.tree.label}: {', '.join(changed)} changed since these results; run `dvc repro`"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---- text


def render(comparison: dict[str, Any], *, colour: bool = False) -> str:
    """The comparison as aligned text."""

    def paint(text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if colour else text

    return "\n\n".join(_recipe_text(recipe, paint) for recipe in comparison["recipes"])


def _recipe_text(recipe: dict[str, Any], paint: Paint) -> str:
    title = paint(f"{recipe['name']}: {printable(recipe['a'])} -> {printable(recipe['b'])}", "1")
    if "only_in" in recipe:
        return f"{title}\n  only in {printable(recipe[recipe['only_in']])}"
    gates = recipe["gates"]
    if not _differs(recipe):
        return f"{title}\n  no difference"
    lines = [title]
    lines += _table("settings", recipe["settings"], show, paint)
    lines += _table("data", recipe["data"], _figure, paint)
    lines += _table("metrics", recipe["metrics"], _figure, paint)
    # The verdict is said even where it is the same, for it is what a change is made for.
    verdict = {"name": "all rules"} | {side: gates[side] for side in ("a", "b") if side in gates}
    lines += _table("gates", [verdict, *gates["rules"]] if len(verdict) > 1 else [], _mark, paint)
    lines += [paint(f"  note: {printable(note)}", "33") for note in recipe["notes"]]
    return "\n".join(lines)


def _differs(recipe: dict[str, Any]) -> bool:
    rows = [*recipe["metrics"], recipe["gates"]]
    return (
        any(recipe[part] for part in ("settings", "data", "notes"))
        or any(row.get("a", ABSENT) != row.get("b", ABSENT) or row.get("comparable") is False for row in rows)
        or bool(recipe["gates"]["rules"])
    )


def _table(title: str, rows: list[dict[str, Any]], text: Callable[[Any], str], paint: Paint) -> list[str]:
    if not rows:
        return []
    cells = []
    for row in rows:
        before, after = (printable(text(row[side])) if side in row else "-" for side in ("a", "b"))
        change = ""
        if "change" in row and text is _figure:
            change = f"{'+' if row['change'] > 0 else ''}{_figure(row['change'])}" if row["change"] else "0"
            change += f" ± {row['stderr']:.2g}" if row.get("stderr") else ""
        cells.append((printable(row["name"]), before, after, change, printable(row.get("says", ""))))
    widths = [max(len(cell[column]) for cell in cells) for column in range(4)]
    lines = [paint(title, "1")]
    for name, before, after, change, says in cells:
        values = f"{before:>{widths[1]}} -> {after:<{widths[2]}}"
        line = f"  {name:<{widths[0]}}  {values}  {change:<{widths[3]}}  {says}".rstrip()
        if text is _mark:
            line = line.replace("PASS", paint("PASS", "32")).replace("FAIL", paint("FAIL", "31"))
        lines.append(line)
    return lines


def _figure(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if _is_number(value) else str(value)


def _mark(passed: bool) -> str:
    return "PASS" if passed else "FAIL"
