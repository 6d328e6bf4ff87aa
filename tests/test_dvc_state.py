"""prefbuild/dvc_state.py: DVC takes our word for what an output hashes to, and reads it when it can't."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from prefbuild.artifact import write_manifest
from prefbuild.digests import Digest, Digests
from prefbuild.dvc_state import WORTH_IT, tell_dvc
from prefbuild.job import Image, Job, Limits, run_job

# No file of these tests hashes to it: where DVC has it, DVC has not read the file.
CLAIMED = "c" * 32


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, check=True)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/model.safetensors").write_bytes(b"weights" * 1000)
    (tmp_path / "merged/config.json").write_text("{}")
    write_manifest(tmp_path / "merged", stage="merge", name="x", inputs={})
    claim(Path("merged/model.safetensors"))
    return tmp_path


def claim(path: Path, later: int = 0) -> None:
    about = path.stat()
    told = Digests(Path("work"))
    told.add(path, Digest(size=about.st_size, changed=about.st_mtime_ns + later, sha256="c" * 64, md5=CLAIMED))
    told.save()


def md5_of_dvc(path: str) -> str:
    """What `dvc add` takes a file in the folder merged to hash to: its name in DVC's cache."""
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "merged"], check=True)
    text = next(Path(".dvc/cache/files/md5").glob("*/*.dir")).read_text()
    return str(next(entry["md5"] for entry in json.loads(text) if entry["relpath"] == path))


def test_dvc_does_not_read_what_was_told(project: Path) -> None:
    assert tell_dvc([Path("merged")], Path("work"), worth_it=0)
    assert md5_of_dvc("model.safetensors") == CLAIMED
    assert md5_of_dvc("config.json") == hashlib.md5(b"{}").hexdigest()


STAGE = """
    import os
    from pathlib import Path

    from prefbuild.artifact import write_manifest
    from prefbuild.digests import Digest, Digests
    from prefbuild.dvc_state import tell_dvc

    Path("merged").mkdir()
    file = Path("merged/model.safetensors")
    file.write_bytes(b"weights" * 1000)
    told = Digests(Path("work"))
    about = file.stat()
    told.add(file, Digest(size=about.st_size, changed=about.st_mtime_ns, sha256="c" * 64, md5="c" * 32))
    told.save()
    write_manifest(Path("merged"), stage="merge", name="x", inputs={})
    assert tell_dvc([Path("merged")], Path("work"), worth_it=0)
"""


def test_dvc_repro_does_not_read_what_its_stage_told(project: Path) -> None:
    Path("stage.py").write_text(textwrap.dedent(STAGE))
    stage = {"cmd": f"{sys.executable} stage.py", "deps": ["stage.py"], "outs": ["merged"]}
    Path("dvc.yaml").write_text(json.dumps({"stages": {"merge": stage}}))
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], check=True)
    text = next(Path(".dvc/cache/files/md5").glob("*/*.dir")).read_text()
    assert {"md5": CLAIMED, "relpath": "model.safetensors"} in json.loads(text)


def test_running_a_stage_tells_dvc_of_large_outputs(project: Path) -> None:
    def run(job: Job) -> int:
        weights = Path("merged/model.safetensors")
        os.truncate(weights, WORTH_IT)  # a hole, which takes no room on the disk
        about = weights.stat()
        told = Digests(job.work)
        told.add(weights, Digest(size=about.st_size, changed=about.st_mtime_ns, sha256="c" * 64, md5=CLAIMED))
        told.save()
        return 0

    job = Job(
        stage="merge",
        name="x",
        argv=[],
        inputs=[],
        outputs=[Path("merged")],
        work=Path("build/.work/merge-x/1"),
        caches=[],
        env={},
        network=False,
        gpus=0,
        image=Image(role="cpu", id=None, repo_digest=None),
        limits=Limits(shm_size=0, tmp_size=0, pids=0),
    )
    assert run_job(job, run) == 0
    assert not job.work.exists()
    assert md5_of_dvc("model.safetensors") == CLAIMED


def test_file_that_changed_since_is_read(project: Path) -> None:
    claim(Path("merged/model.safetensors"), later=1)
    assert tell_dvc([Path("merged")], Path("work"), worth_it=0)
    assert md5_of_dvc("model.safetensors") == hashlib.md5(b"weights" * 1000).hexdigest()


def test_only_outputs_of_the_stage_are_told(project: Path) -> None:
    assert tell_dvc([Path("other"), Path("merged/model")], Path("work"), worth_it=0)
    assert md5_of_dvc("model.safetensors") == hashlib.md5(b"weights" * 1000).hexdigest()


def test_only_files_of_artifacts_are_told(project: Path) -> None:
    Path("merged/manifest.json").unlink()
    assert tell_dvc([Path("merged")], Path("work"), worth_it=0)
    assert md5_of_dvc("model.safetensors") == hashlib.md5(b"weights" * 1000).hexdigest()


def test_little_is_left_to_dvc(project: Path) -> None:
    assert not tell_dvc([Path("merged")], Path("work"))


@pytest.mark.parametrize("broken", ["no json", '{"merged/config.json": {"md5": 1}}', "[]", None])
def test_what_a_stage_left_broken_is_passed_over(project: Path, broken: str | None) -> None:
    digests = Path("work/digests.json")
    digests.unlink()
    if broken is None:
        os.mkfifo(digests)  # to open it would hang
    else:
        digests.write_text(broken)
    assert not tell_dvc([Path("merged")], Path("work"), worth_it=0)
    assert md5_of_dvc("model.safetensors") == hashlib.md5(b"weights" * 1000).hexdigest()


def test_without_a_dvc_project_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("merged").mkdir()
    Path("merged/file").write_text("one")
    write_manifest(Path("merged"), stage="merge", name="x", inputs={})
    claim(Path("merged/file"))
    assert not tell_dvc([Path("merged")], Path("work"), worth_it=0)
    assert capfd.readouterr() == ("", "")
