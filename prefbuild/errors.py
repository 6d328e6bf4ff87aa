"""Every error a user can meet, each with its exit code.

PrefbuildError            1  anything a user can act on
  UsageError              2  the command line asks for something that is not there
  RecipeError             3  a recipe, params.yaml or the lock says something wrong
  LockError               4  what a recipe names is not pinned, or is not what was pinned
  GraphError              5  the DVC files are not what the recipes ask for
  DataError               6  rows or a chat template that cannot be trained on
  StageError              7  a stage could not do its work
  GateFailed              8  a gate failed: the build is whole, the model is not good enough
  PromotionRefused        9  what would be published is not what passed its gates
"""


class PrefbuildError(Exception):
    """Root of all errors that are shown without a traceback."""

    exit_code = 1


class UsageError(PrefbuildError):
    exit_code = 2


class RecipeError(PrefbuildError):
    """One or more problems in YAML files, a line each: `file:line: key: what, what instead`."""

    exit_code = 3

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


class LockError(PrefbuildError):
    exit_code = 4


class GraphError(PrefbuildError):
    exit_code = 5


class DataError(PrefbuildError):
    exit_code = 6


class StageError(PrefbuildError):
    exit_code = 7


class GateFailed(PrefbuildError):
    exit_code = 8


class PromotionRefused(PrefbuildError):
    exit_code = 9
