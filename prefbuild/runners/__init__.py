"""What can run a job: a module with `run(job) -> exit code` each."""

from prefbuild.job import Runner
from prefbuild.runners import local

RUNNERS: dict[str, Runner] = {"local": local.run}
