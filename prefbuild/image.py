"""Make, pin and list the images that stages run in.

An image is made from containers/ROLE.Dockerfile, what lies beside it, and the package itself. The lock pins its ID,
never a tag. Covered: what goes into a build is fixed by digests (the base, every package) and nothing of the caller's
environment does. Not covered: Debian's packages, which are as new as the build, so two builds from nothing differ.
"""

import io
import re
import shutil
import sys
import tarfile
from collections import deque
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefbuild import __version__
from prefbuild.artifact import digest_of, sha256_file
from prefbuild.engine import address, connect
from prefbuild.errors import LockError, StageError, UsageError
from prefbuild.lock import IMAGE_ID, pin_image, read_lock
from prefbuild.recipe import ROLE

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.images import Image

PACKAGE = Path(__file__).parent
SHIPPED = PACKAGE / "templates" / "containers"
PYTHON = "/opt/prefbuild/bin/python"
TRACKING = re.compile(r"^ARG\s+TRACKING=", re.MULTILINE)
BASE = re.compile(r"^ARG\s+BASE(?:=(\S+))?\s*$", re.MULTILINE)
# What pip, apt and the engine say when a build has no network or no names in it.
NETWORK_TROUBLE = re.compile(
    r"name resolution|Could not resolve|Name or service not known|Network is unreachable|NewConnectionError"
    r"|No matching distribution found|network bridge not found|Connection timed out"
)
TAIL = 20


def code_digest() -> str:
    """Digest of the package's files as an image carries them: the label `prefbuild.code`."""
    return digest_of({name: sha256_file(path) for name, path in package_files().items()})


def is_current(image: "Image") -> bool:
    """Whether an image holds the code of this machine's prefbuild."""
    return bool(image.labels.get("prefbuild.code") == code_digest())


def has_trackers(labels: dict[str, str]) -> bool:
    """Whether an image was built with the packages of train.report_to."""
    return labels.get("prefbuild.tracking") == "yes"


def package_files() -> dict[str, Path]:
    """The package's own files by their path in it, without what only makes images, caches and hidden files."""
    return {
        name: path for name, path in _files(PACKAGE).items() if not name.startswith(f"templates/{SHIPPED.name}/")
    }  # fmt: skip


def build(
    root: Path, role: str, *, base: str | None = None, network: str | None = None, tracking: bool = False
) -> list[str]:
    """Make a role's image and pin it; prints the build as it goes and returns the lines that say what changed.

    `base` is an image to build on instead of the Dockerfile's own; `network` is the engine's network for the build;
    with `tracking` the image has the packages of train.report_to.
    Raises UsageError for a role without a Dockerfile, StageError for a build that fails: the step, why, what to do.
    """
    files = _context_files(root, role)
    dockerfile = files[f"{role}.Dockerfile"]
    if tracking and not TRACKING.search(dockerfile.read_text(encoding="utf-8")):
        raise UsageError(
            f"{_shown(dockerfile, root)}: takes no --tracking; write `ARG TRACKING=`, and install "
            "requirements-tracking.txt where that is not empty, as cpu.Dockerfile does"
        )
    before = read_lock(root)["images"].get(role)
    client = connect()
    print(f"building image {role} from {_shown(dockerfile, root)}")
    labels = {"prefbuild.role": role, "prefbuild.version": __version__, "prefbuild.code": code_digest()}
    arguments = {}
    if tracking:
        arguments["TRACKING"] = labels["prefbuild.tracking"] = "yes"
    reference = _base(dockerfile, root, base)
    if reference is not None:
        image = _base_image(client, reference)
        labels["prefbuild.base"] = _repo_digest(image, reference) or str(image.id)
        # By ID, so that what is built on is what the label says, whatever the tag means by then.
        arguments["BASE"] = str(image.id)
    id = _build(client, role, _context(files), arguments, labels, network, _shown(dockerfile, root))
    image = client.images.get(id)
    # A tag of its own, so that `docker image prune` does not take what a lock pins.
    image.tag(f"prefbuild-{role}", id.removeprefix("sha256:")[:12])
    print(f"image {role} is {id}, {_size(image)}, tagged prefbuild-{role}:{id.removeprefix('sha256:')[:12]}")
    return _pin(root, role, image, None, before)


def lock(root: Path, role: str, reference: str) -> list[str]:
    """Pin an image that the engine has; returns the lines that say what changed, and a warning for other code.

    Raises StageError when it is not there (nothing is pulled), LockError when it is not an image of prefbuild.
    """
    import docker

    _check_role(role)
    before = read_lock(root)["images"].get(role)
    client = connect()
    try:
        image = client.images.get(reference)
    except docker.errors.ImageNotFound:
        raise StageError(
            f"{reference}: is not in the engine at {address()}, and is not pulled by itself; "
            f"run `docker pull {reference}`, then this again"
        ) from None
    except docker.errors.APIError as error:
        raise StageError(f"{reference}: {error.explanation or error}") from None
    labels = image.labels
    entrypoint = image.attrs["Config"].get("Entrypoint")
    if "prefbuild.code" not in labels or entrypoint != [PYTHON]:
        raise LockError(
            f"{reference}: is not an image of prefbuild (its entrypoint is {entrypoint}, "
            f"its labels are {', '.join(sorted(labels)) or 'none'}); build one with `prefbuild image build {role}`"
        )
    lines = _pin(root, role, image, reference, before)
    if not is_current(image):
        lines.append(
            f"warning: it holds prefbuild {labels.get('prefbuild.version', '?')} with other code than this one "
            f"({__version__}): its stages may do other things than this machine's; "
            f"`prefbuild image build {role}` makes one of this code"
        )
    return lines


def list_images(root: Path) -> str:
    """A table of all roles: what is pinned, and what the engine knows of it. Works without an engine."""
    pinned = read_lock(root)["images"]
    roles = sorted({*pinned, *_roles(root)})
    trouble = ""
    client = None
    try:
        client = connect()
    except StageError as error:
        trouble = f"\n{error}"
    rows: list[tuple[str, ...]] = [("role", "pinned", "in a registry", "engine", "size", "made", "code")]
    rows += [_row(client, role, pinned.get(role)) for role in roles]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + trouble


# ---- the build context


def _context_files(root: Path, role: str) -> dict[str, Path]:
    """What a build may copy: the shipped files, the project's in their place, and the package under prefbuild/."""
    _check_role(role)
    roles = _roles(root)
    if role not in roles:
        close = get_close_matches(role, roles, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(roles)}"
        raise UsageError(f"{role}: no containers/{role}.Dockerfile here, and none comes with prefbuild; {hint}")
    package = {f"prefbuild/{name}": path for name, path in package_files().items()}
    return {**_files(SHIPPED), **_files(root / "containers"), **package}


def _context(files: dict[str, Path]) -> io.BytesIO:
    """A tar of the files in which only their names, bytes and being executable count: the engine caches by those."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, path in sorted(files.items()):
            data = path.read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
            tar.addfile(member, io.BytesIO(data))
    archive.seek(0)
    return archive


def _files(folder: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        # Hidden files are caches, editors' and secrets; a backup ends in ~.
        if any(part.startswith(".") or part == "__pycache__" for part in name.parts) or path.suffix == ".pyc":
            continue
        if path.is_file() and not path.name.endswith("~"):
            found[name.as_posix()] = path
    return found


def _roles(root: Path) -> list[str]:
    names = {path.name for folder in (SHIPPED, root / "containers") for path in folder.glob("*.Dockerfile")}
    return sorted(name.removesuffix(".Dockerfile") for name in names)


def _check_role(role: str) -> None:
    if not re.fullmatch(ROLE, role):
        raise UsageError(f"{role}: is no role of an image; use lower-case letters, digits and -, at most 32")


def _shown(path: Path, root: Path) -> str:
    if path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return f"{path.name} (prefbuild's own)"


# ---- the base


def _base(dockerfile: Path, root: Path, asked: str | None) -> str | None:
    """What to build on: what was asked for, else the Dockerfile's own. None when it leaves no choice."""
    found = BASE.search(dockerfile.read_text(encoding="utf-8"))
    if found is None:
        if asked is not None:
            raise UsageError(
                f"{_shown(dockerfile, root)}: takes no --base; begin it with `ARG BASE=...` and `FROM ${{BASE}}`"
            )
        return None
    reference = asked or found[1]
    if reference is None:
        raise UsageError(f"{_shown(dockerfile, root)}: ARG BASE has no default; give --base IMAGE")
    return reference


def _base_image(client: "DockerClient", reference: str) -> "Image":
    """The base in the engine; pulled, and told so, when it is not there."""
    import docker
    import requests

    try:
        return client.images.get(reference)
    except docker.errors.ImageNotFound:
        pass
    try:
        if IMAGE_ID.fullmatch(reference):
            raise docker.errors.ImageNotFound("an ID names what an engine has; a registry knows names")
        print(f"pulling the base {reference}", flush=True)
        name, tag = docker.utils.parse_repository_tag(reference)
        for line in client.api.pull(name, tag=tag or "latest", stream=True, decode=True):
            if "error" in line:
                raise docker.errors.DockerException(line["error"])
        return client.images.get(reference)
    except (docker.errors.DockerException, requests.RequestException) as error:
        reason = getattr(error, "explanation", None) or error
        raise StageError(
            f"the base {reference} is not in the engine at {address()} and could not be pulled: {reason}; "
            f"give one that it has or reaches with --base IMAGE (containers/README.md says how to make one offline)"
        ) from None


def _repo_digest(image: "Image", reference: str | None) -> str | None:
    """The image's name@sha256 in a registry: the one that was asked for, else the first. None when it is in none."""
    digests = sorted(image.attrs.get("RepoDigests") or [])
    if reference is None or not digests:
        return digests[0] if digests else None
    name = re.sub(r"(@sha256:[0-9a-f]{64}|:[^/:@]+)+$", "", reference)
    # Docker leaves the default registry and library/ out of its own names.
    return next((digest for digest in digests if name.endswith(digest.split("@")[0])), digests[0])


# ---- the build


def _build(
    client: "DockerClient",
    role: str,
    context: io.BytesIO,
    arguments: dict[str, str],
    labels: dict[str, str],
    network: str | None,
    shown: str,
) -> str:
    """Run the build, print it as it goes, and return the image's ID."""
    import docker
    import requests

    said = _Said()
    try:
        answers = client.api.build(
            fileobj=context,
            custom_context=True,
            dockerfile=f"{role}.Dockerfile",
            buildargs=arguments,
            labels=labels,
            network_mode=network,
            use_config_proxy=False,  # proxies can have passwords, and a build argument stays in the image
            rm=True,
            forcerm=True,  # also of a build that fails or is stopped
            decode=True,
        )
        for answer in answers:
            said.take(answer)
    except (docker.errors.DockerException, requests.RequestException) as error:
        said.error = str(getattr(error, "explanation", None) or error)
    finally:
        said.end()
    if said.error is None and said.id is None:
        said.error = "the engine ended the build without an image"
    if said.error is not None:
        raise StageError(_failure(role, shown, said, network))
    return str(client.images.get(said.id).id)


class _Said:
    """What the engine has said: prints steps that run and their output, keeps the last lines for an error."""

    def __init__(self) -> None:
        self.step = ""
        self.tail: deque[str] = deque(maxlen=TAIL)
        self.error: str | None = None
        self.id: str | None = None
        self.cached = 0
        self.rest = ""

    def take(self, answer: dict[str, Any]) -> None:
        if "error" in answer:
            self.error = str(answer.get("errorDetail", {}).get("message") or answer["error"])
        if "ID" in (answer.get("aux") or {}):
            self.id = answer["aux"]["ID"]
        # A line can come in pieces.
        *lines, self.rest = (self.rest + answer.get("stream", "")).split("\n")
        for line in lines:
            self._line(line.rstrip())

    def _line(self, line: str) -> None:
        # Without colours, and of a line that was written over itself the last.
        text = re.sub(r"\x1b\[[0-9;]*m", "", line).rpartition("\r")[2].strip()
        if re.match(r"Step \d+/\d+ : ", text):
            self.step = text
            self.tail.clear()
        elif text == "---> Using cache":
            self.cached += 1
        elif text.startswith("---> Running in"):
            self._show(self.step)
        elif found := re.fullmatch(r"Successfully built ([0-9a-f]+)", text):
            self.id = self.id or found[1]
        elif text and not re.match(r"---> |Removing intermediate container|\[Warning\] One or more build-args", text):
            self.tail.append(text)
            self._show(f"  {text}", passing=True)

    def _show(self, text: str, *, passing: bool = False) -> None:
        """Print a line, as long as the screen is wide; on a terminal the next one writes over a passing one."""
        width = shutil.get_terminal_size((160, 24)).columns
        text = text if len(text) < width else text[: width - 4] + "..."
        if sys.stdout.isatty():
            print(f"\r\x1b[K{text}", end="" if passing else "\n", flush=True)
        else:
            print(text, flush=True)

    def end(self) -> None:
        if self.rest.strip():
            self._line(self.rest)
            self.rest = ""
        if sys.stdout.isatty():
            print("\r\x1b[K", end="")
        if self.cached:
            self._show(f"{self.cached} steps were made before")


def _failure(role: str, shown: str, said: _Said, network: str | None) -> str:
    lines = [f"image {role}: {shown}: {said.step or 'the build did not start'}"]
    lines += [f"  {line}" for line in said.tail]
    lines.append(f"  {said.error}")
    if NETWORK_TROUBLE.search("\n".join([*said.tail, said.error or ""])) and network != "host":
        lines.append(
            "the build may have had no network: `--network host` uses this machine's; an index of your own belongs "
            "in the base's /etc/pip.conf (containers/README.md)"
        )
    return "\n".join(lines)


# ---- the lock, and the table


def _pin(root: Path, role: str, image: "Image", reference: str | None, before: dict[str, Any] | None) -> list[str]:
    id = str(image.id)
    digest = _repo_digest(image, reference)
    if before is not None and before["id"] == id and digest is None:
        digest = before["repo_digest"]  # the image is in a registry still; this engine just did not pull it from there
    lines = pin_image(root, role, {"id": id, "repo_digest": digest})
    if before is not None and before["id"] != id:
        lines.append("stages that ran in the old image will run again: `prefbuild status` says which")
    return lines or [f"image {role}: nothing changed"]


def _row(client: "DockerClient | None", role: str, entry: dict[str, Any] | None) -> tuple[str, ...]:
    import docker

    if entry is None:
        return (role, "no", "-", "-", "-", "-", "-")
    digest = entry["repo_digest"]
    # The whole digest can be read in the lock.
    known = (role, entry["id"][7:19], re.sub(r"(@sha256:[0-9a-f]{12}).*", r"\1", digest) if digest else "no")
    if client is None:
        return (*known, "?", "?", "?", "?")
    image = None
    for reference in filter(None, (entry["id"], digest)):
        try:
            image = client.images.get(reference)
            break
        except docker.errors.ImageNotFound:
            continue
    if image is None:
        return (*known, "missing", "-", "-", "-")
    made = str(image.attrs.get("Created", ""))[:16].replace("T", " ")
    code = "up to date" if is_current(image) else "other"
    return (*known, "has it", _size(image), made, code)


def _size(image: "Image") -> str:
    return f"{image.attrs['Size'] / 1e9:.2f} GB"
