"""Judge a build by its recipe's gates: writes gate.json.

A failed verdict is a result like any other, so the stage ends well: one bad model must not stop the others' builds.
`prefbuild build` and `prefbuild gates` exit non-zero on it, and promote refuses.
"""

from pathlib import Path
from typing import Any

from prefbuild.artifact import write_json
from prefbuild.gates import judge, verdict_table


def run(
    settings: dict[str, Any],
    inputs: dict[str, Path | list[Path]],
    outputs: dict[str, Path],
    work: Path,
    name: str,
) -> None:
    """Write the verdict, the same bytes for the same files, and print it."""
    paths = {
        role: [path.as_posix() for path in value] if isinstance(value, list) else value.as_posix()
        for role, value in inputs.items()
    }
    verdict = judge(settings, paths, name)
    write_json(outputs["gate"], verdict)
    print(verdict_table(verdict))
