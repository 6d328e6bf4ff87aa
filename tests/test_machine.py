"""What this machine has."""

from pathlib import Path

import pytest

from prefbuild import machine


def test_triton_is_of_use_with_a_compiler_and_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    has_triton = machine.has_triton.__wrapped__  # which keeps no answer
    compiler = tmp_path / "gcc"
    compiler.write_text("")
    compiler.chmod(0o755)
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(machine, "find_spec", lambda name: name)
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda *_: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert has_triton()
    compiler.unlink()
    assert not has_triton()
    monkeypatch.setenv("CC", "/opt/cc")
    assert has_triton()
    (tmp_path / "Python.h").unlink()
    assert not has_triton()
