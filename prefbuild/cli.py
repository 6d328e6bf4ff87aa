"""Parse arguments, call one function, map errors to exit codes. Imports nothing heavy."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from prefbuild import __version__
from prefbuild.errors import PrefbuildError

EXAMPLES = """\
a build, from nothing to a published model:
  prefbuild new my-model              write recipes/my-model.yaml and edit it
  prefbuild check                     every problem of every recipe, at once
  prefbuild lock                      pin models, data and tasks by digest
  prefbuild preview my-model          rows as the model will see them
  prefbuild plan my-model             what will fit the GPU, how long it takes
  prefbuild build my-model            train, merge, evaluate, judge (dvc repro)
  prefbuild diff HEAD my-model        what the last edit changed
  prefbuild promote my-model          publish, if its gates passed
  prefbuild verify owner/model@v1     are these the bytes that passed?

exit codes: 2 usage, 3 recipe, 4 lock, 5 graph, 6 data, 7 stage, 8 gate failed, 9 promotion refused
"""


def main(argv: list[str] | None = None) -> int:
    """The `prefbuild` command; returns its exit code."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except PrefbuildError as error:
        sys.stdout.flush()  # into a file or a pipe, what was printed before would come after
        print(f"prefbuild: {error}", file=sys.stderr)
        return error.exit_code
    except PermissionError as error:
        print(f"prefbuild: {error.filename}: no permission ({error.strerror}); mend its owner or mode", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has gone; Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="prefbuild",
        description="`make` for preference-tuned language models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"prefbuild {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name, run, help, example, among=commands):  # type: ignore[no-untyped-def]
        sub = among.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    def runner(sub):  # type: ignore[no-untyped-def]
        sub.add_argument(
            "--runner",
            metavar="RUNNER",
            help="local or docker; default: PREFBUILD_RUNNER, then `runner:` in ~/.config/prefbuild/settings.yaml, then local",
        )

    def key(sub, help):  # type: ignore[no-untyped-def]
        sub.add_argument(
            "--key", metavar="FOLDER", help=f"{help}; default: PREFBUILD_KEY, then ~/.config/prefbuild/keys"
        )

    sub = command(
        "new",
        _new,
        "start a recipe, and a project where there is none",
        "prefbuild new my-model --like smollm2-concise",
    )
    sub.add_argument("name", help="the recipe's name: lower-case letters, digits, - and _")
    sub.add_argument("--like", metavar="RECIPE", help="copy this recipe")

    sub = command("check", _check, "report every problem of every recipe", "prefbuild check")

    sub = command("lock", _lock, "pin what recipes refer to, in prefbuild.lock.yaml", "prefbuild lock smollm2-concise")
    sub.add_argument("names", nargs="*", metavar="NAME", help="recipes; default: all")
    sub.add_argument("--update", action="store_true", help="pin what branches and tags of the Hub are at now")

    images = commands.add_parser(
        "image",
        help="make, pin and list the images that stages run in",
        description="Make, pin and list the images that stages run in.",
        epilog="example:\n  prefbuild image build cpu\n  prefbuild image list",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).add_subparsers(title="commands", metavar="COMMAND", required=True)

    sub = command(
        "build",
        _image_build,
        "make a role's image from containers/ROLE.Dockerfile and pin it",
        "prefbuild image build cpu\n  prefbuild image build cuda --base registry.example.org/cuda:13.0 --network host",
        among=images,
    )
    sub.add_argument("role", metavar="ROLE", help="cpu, cuda, or your own containers/ROLE.Dockerfile")
    sub.add_argument("--base", metavar="IMAGE", help="build on this image instead of the Dockerfile's")
    sub.add_argument("--network", metavar="NAME", help="the engine's network for the build, such as host")
    sub.add_argument("--tracking", action="store_true", help="with the packages that train.report_to needs")

    sub = command(
        "lock",
        _image_lock,
        "pin an image that the engine has",
        "prefbuild image lock cuda registry.example.org/prefbuild-cuda@sha256:...",
        among=images,
    )
    sub.add_argument("role", metavar="ROLE", help="the role it is for, such as cpu")
    sub.add_argument("reference", metavar="REFERENCE", help="name@sha256:..., a tag, or an image ID")

    command("list", _image_list, "what is pinned, and what the engine has of it", "prefbuild image list", among=images)

    sub = command("sync", _sync, "write the DVC files the recipes ask for", "prefbuild sync --check")
    sub.add_argument("--check", action="store_true", help="write nothing; fail when a file is out of date")

    sub = command(
        "status", _status, "what a build would run, and the value that changed", "prefbuild status smollm2-concise"
    )
    sub.add_argument("names", nargs="*", metavar="NAME", help="recipes; default: all")
    sub.add_argument("--json", action="store_true", help="for programs")

    sub = command(
        "preview",
        _preview,
        "show rows as the model will see them, and what was dropped",
        "prefbuild preview smollm2-concise -n 5",
    )
    sub.add_argument("name", metavar="NAME", help="the recipe")
    sub.add_argument("-n", "--num-rows", type=int, default=3, help="rows to show (default: 3)")

    sub = command(
        "reward",
        _reward,
        "score completions with a recipe's rewards, as training would",
        """prefbuild reward my-grpo --try answers.jsonl -n 5
  prefbuild reward my-grpo --try --column summary
  echo '{"prompt": "6 times 7?", "completion": "42", "answer": "#### 42"}' | prefbuild reward my-grpo --try""",
    )
    sub.add_argument("name", metavar="NAME", help="the recipe")
    sub.add_argument(
        "--try",
        dest="given",
        metavar="FILE",
        nargs="?",
        const="-",
        required=True,
        help="JSON Lines of {prompt, completion, and the columns that rewards read}; default: stdin",
    )
    sub.add_argument("--column", metavar="COLUMN", help="take the recipe's own rows, with completions in this column")
    sub.add_argument("-n", "--num-rows", type=int, default=10, help="completions to score (default: 10)")

    sub = command(
        "build",
        _build,
        "sync, dvc repro, and the verdict; fails when a gate does",
        "prefbuild build smollm2-concise --pull",
    )
    sub.add_argument("names", nargs="*", metavar="NAME", help="recipes; default: all, and the report")
    sub.add_argument("-k", "--keep-going", action="store_true", help="build the other recipes when one fails")
    sub.add_argument(
        "--pull", action="store_true", help="fetch results from the DVC remote instead of making them again"
    )
    runner(sub)

    sub = command(
        "clean",
        _clean,
        "remove what builds that were killed left behind",
        "prefbuild clean --containers",
    )
    sub.add_argument(
        "--containers",
        action="store_true",
        required=True,
        help="containers of yours whose prefbuild is gone, in any state",
    )

    sub = command("gates", _gates, "print verdicts; fails when a gate does", "prefbuild gates smollm2-concise")
    sub.add_argument("names", nargs="*", metavar="NAME", help="recipes; default: all")

    sub = command(
        "diff",
        _diff,
        "settings, data and metrics of two revisions or recipes, side by side",
        "prefbuild diff HEAD~1 HEAD --recipe smollm2-concise",
    )
    sub.add_argument("a", metavar="A", help="a recipe or a git revision")
    sub.add_argument("b", metavar="B", nargs="?", help="the other; default: the files as they are")
    sub.add_argument("--recipe", metavar="NAME", help="only this recipe, between revisions")
    sub.add_argument("--json", action="store_true", help="for programs")

    sub = command(
        "track",
        _track,
        "where training was tracked, how to see it, and sending it to Weights & Biases",
        "prefbuild track my-model --to wandb",
    )
    sub.add_argument("name", metavar="NAME", help="the recipe")
    sub.add_argument(
        "--to", choices=["wandb"], help="send what was tracked offline, with your own login; default: say what is there"
    )

    sub = command(
        "generate", _generate, "ask a built model", 'prefbuild generate smollm2-concise "What is the capital of Peru?"'
    )
    sub.add_argument("name", metavar="NAME", help="the recipe")
    sub.add_argument("prompt", help="what the user says")
    sub.add_argument("--system", help="a system message")
    sub.add_argument("--max-new-tokens", type=int, default=256, help="default: 256")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    sub.add_argument("--top-p", type=float, help="sample among the likeliest tokens of this probability")
    sub.add_argument("--min-p", type=float, help="leave out tokens less likely than this share of the likeliest one's")
    sub.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")

    sub = command(
        "promote", _promote, "publish exactly the model that passed its gates", "prefbuild promote smollm2-concise"
    )
    sub.add_argument("name", metavar="NAME", help="the recipe")
    sub.add_argument("--allow-dirty", action="store_true", help="publish though sources are not committed; recorded")
    sub.add_argument(
        "--replace", action="store_true", help="publish over files in a Hub repository that no promotion put there"
    )
    key(sub, "sign with the keys in this folder")

    sub = command(
        "promotions", _promotions, "what was promoted, when, where to, from which commit", "prefbuild promotions"
    )
    sub.add_argument("--json", action="store_true", help="for programs")

    sub = command(
        "verify",
        _verify,
        "check that a published model is exactly what passed its gates",
        "prefbuild verify owner/model@v2\n  prefbuild verify registry/smollm2-concise/v1",
    )
    sub.add_argument("what", metavar="REPO[@REV]", help="a repository on the Hub, or a folder")
    sub.add_argument("--quick", action="store_true", help="take the Hub's word for the digests of large files")
    key(sub, "the folder with the signer's public keys")

    sub = command(
        "rollback",
        _rollback,
        "make the version promoted before the current one current again",
        "prefbuild rollback smollm2-concise\n  prefbuild rollback smollm2-concise --to v1",
    )
    sub.add_argument("name", metavar="NAME", help="the recipe")
    sub.add_argument("--to", metavar="VERSION", help="go back to this version")
    sub.add_argument("--replace", action="store_true", help="also when main holds files that no promotion put there")
    key(sub, "the folder with the signer's public keys")

    sub = command("keygen", _keygen, "make the keys that promotions are signed with", "prefbuild keygen --passphrase")
    sub.add_argument("folder", metavar="FOLDER", nargs="?", help="default: ~/.config/prefbuild/keys")
    sub.add_argument(
        "--passphrase", action="store_true", help="encrypt the private keys; asked for, or PREFBUILD_KEY_PASSPHRASE"
    )

    sub = command("doctor", _doctor, "what this machine lacks for a recipe", "prefbuild doctor smollm2-concise")
    sub.add_argument("name", metavar="NAME", help="the recipe")

    sub = command(
        "plan",
        _plan,
        "what of a recipe's training will fit a GPU, its micro-batches, memory and time",
        "prefbuild plan my-model\n  prefbuild plan my-model --gpu H100\n  prefbuild plan my-model --gpu-memory 24GB --json",
    )
    sub.add_argument("name", metavar="NAME", help="the recipe")
    sub.add_argument("--gpu", metavar="GPU", help="plan for this kind, as in H100; default: this machine's, measured")
    sub.add_argument("--gpu-memory", metavar="SIZE", help="plan for so much memory, as in 80GB; default: what it has")
    sub.add_argument("--json", action="store_true", help="for programs; bytes and seconds")

    command(
        "schema",
        _schema,
        "print the JSON Schema of recipes, for editors",
        "prefbuild schema > recipes/recipe.schema.json",
    )
    command("resolve", _resolve, "write the resolved recipes (a DVC stage)", "prefbuild resolve")

    sub = command("stage", _stage, "run one stage (what DVC calls)", "prefbuild stage train smollm2-concise")
    sub.add_argument(
        "stage",
        metavar="STAGE",
        help="model, data, prepare, reference, train, merge, evaluate, baseline, gate or report",
    )
    sub.add_argument(
        "name", metavar="NAME", nargs="?", default="report", help="the recipe, or the shared model, data or baseline"
    )
    runner(sub)
    return top


def _enter_project() -> Path:
    """Make the project's root the working directory, which every stage takes it to be."""
    from prefbuild.resolve import find_root

    root = find_root(Path.cwd())
    os.chdir(root)
    return Path(".")


def _new(arguments: argparse.Namespace) -> int:
    from prefbuild.new import new

    print("\n".join(new(Path.cwd(), arguments.name, like=arguments.like)))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from prefbuild.recipe import load_recipes

    recipes = load_recipes(_enter_project())
    print("\n".join(f"recipes/{name}.yaml: ok" for name in recipes))
    return 0


def _lock(arguments: argparse.Namespace) -> int:
    from prefbuild.lock import lock
    from prefbuild.recipe import known_recipes, load_recipes

    root = _enter_project()
    recipes = load_recipes(root)
    names = known_recipes(arguments.names, recipes) if arguments.names else None
    changes = lock(root, recipes, names, update=arguments.update)
    print("\n".join(changes) or "prefbuild.lock.yaml: nothing changed")
    return 0


def _image_build(arguments: argparse.Namespace) -> int:
    from prefbuild.image import build

    root, role = _enter_project(), arguments.role
    lines = build(root, role, base=arguments.base, network=arguments.network, tracking=arguments.tracking)
    print("\n".join(lines))
    return 0


def _image_lock(arguments: argparse.Namespace) -> int:
    from prefbuild.image import lock

    print("\n".join(lock(_enter_project(), arguments.role, arguments.reference)))
    return 0


def _image_list(arguments: argparse.Namespace) -> int:
    from prefbuild.image import list_images

    print(list_images(_enter_project()))
    return 0


def _sync(arguments: argparse.Namespace) -> int:
    from prefbuild.errors import GraphError
    from prefbuild.pipeline import sync
    from prefbuild.resolve import load_project

    changed = sync(load_project(_enter_project()), check=arguments.check)
    if changed and arguments.check:
        raise GraphError(f"{', '.join(changed)} out of date; run `prefbuild sync`")
    print("\n".join(f"wrote {path}" for path in changed) or "the DVC files are up to date")
    return 0


def _resolve(arguments: argparse.Namespace) -> int:
    from prefbuild.errors import LockError
    from prefbuild.lock import check_local
    from prefbuild.pipeline import check_synced
    from prefbuild.resolve import load_project, resolve, write_resolved

    root = _enter_project()
    project = load_project(root)
    check_synced(project)
    resolved = resolve(project)
    changed = [problem for recipe in project.recipes.values() for problem in check_local(root, project.lock, recipe)]
    if changed:
        raise LockError("\n".join(dict.fromkeys(changed)))
    for path in write_resolved(root, resolved):
        print(f"wrote {path}")
    return 0


def _stage(arguments: argparse.Namespace) -> int:
    from prefbuild.job import make_job, run_job
    from prefbuild.runners import RUNNERS, choose_runner

    _enter_project()
    job = make_job(arguments.stage, arguments.name)
    if arguments.stage == "train":
        _refuse_vain_training(arguments.name)
    return run_job(job, RUNNERS[choose_runner(arguments.runner)])


def _refuse_vain_training(name: str) -> None:
    """StageError when the recipe promotes to the Hub, and the Hub says now that it can't."""
    from prefbuild.artifact import read_json
    from prefbuild.errors import StageError
    from prefbuild.resolve import resolved_path

    section = read_json(Path(resolved_path("train", name))).get("promote")
    target = section["settings"]["promote"] if section else {}
    if target.get("to") != "hub" or os.environ.get("PREFBUILD_TRAIN_ANYWAY") == "1":
        return
    from prefbuild.promote.access import CouldNotAsk, write_access

    try:
        problem = write_access(target["repo"], target["private"])
    except CouldNotAsk as error:
        print(f"prefbuild: whether {name} can be promoted to {target['repo']} is not known: {error}", file=sys.stderr)
        return
    if problem:
        raise StageError(
            f"train {name}: training would end in a model that you can't promote to {target['repo']}: {problem}. "
            "To train all the same: PREFBUILD_TRAIN_ANYWAY=1"
        )


def _status(arguments: argparse.Namespace) -> int:
    from prefbuild.status import status, status_json, status_text

    changes = status(_enter_project(), arguments.names or None)
    print(status_json(changes) if arguments.json else status_text(changes))
    return 0


def _preview(arguments: argparse.Namespace) -> int:
    from prefbuild.build import inputs_of
    from prefbuild.stages.prepare import preview

    settings, inputs = inputs_of(_enter_project(), "prepare", arguments.name)
    print(preview(settings, inputs, arguments.num_rows, color=sys.stdout.isatty()))
    return 0


def _reward(arguments: argparse.Namespace) -> int:
    from prefbuild.reward import try_rewards

    given = arguments.given if arguments.given == "-" else os.path.abspath(arguments.given)
    options = {"num_rows": arguments.num_rows, "column": arguments.column}
    print(try_rewards(_enter_project(), arguments.name, given, **options))
    return 0


def _build(arguments: argparse.Namespace) -> int:
    from prefbuild.build import build
    from prefbuild.runners import choose_runner

    runner = choose_runner(arguments.runner)
    os.environ["PREFBUILD_RUNNER"] = runner  # for the stages that DVC starts
    return build(_enter_project(), arguments.names, keep_going=arguments.keep_going, pull=arguments.pull, runner=runner)


def _clean(arguments: argparse.Namespace) -> int:
    from prefbuild.runners.containers import clean

    print("\n".join(clean()) or "no container of yours is left")
    return 0


def _gates(arguments: argparse.Namespace) -> int:
    from prefbuild.build import gates

    return gates(_enter_project(), arguments.names)


def _diff(arguments: argparse.Namespace) -> int:
    import json

    from prefbuild.diff import diff, diff_json

    root = _enter_project()
    if arguments.json:
        print(json.dumps(diff_json(root, arguments.a, arguments.b, arguments.recipe), indent=2))
    else:
        print(diff(root, arguments.a, arguments.b, arguments.recipe))
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from prefbuild.errors import UsageError
    from prefbuild.generate import generate

    folder = _enter_project() / "build" / arguments.name / "merged"
    if not folder.is_dir():
        raise UsageError(f"{folder}: is not built; run `prefbuild build {arguments.name}`")
    generate(
        folder,
        arguments.prompt,
        system=arguments.system,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        seed=arguments.seed,
        stream=True,
    )
    return 0


def _track(arguments: argparse.Namespace) -> int:
    from prefbuild.recipe import known_recipes, load_recipes
    from prefbuild.track import send, track

    known_recipes([arguments.name], load_recipes(_enter_project()))
    if arguments.to:
        return send(arguments.name, arguments.to)
    print(track(arguments.name))
    return 0


def _promote(arguments: argparse.Namespace) -> int:
    from prefbuild.promote import promote

    options = {"allow_dirty": arguments.allow_dirty, "key": arguments.key, "replace": arguments.replace}
    record = promote(_enter_project(), arguments.name, **options)
    already = " (already there: nothing changed)" if record["already"] else ""
    print(f"promoted {arguments.name} {record['version']}: {_place(record)}{already}")
    return 0


def _place(record: dict[str, Any]) -> str:
    if record["to"] == "directory":
        return f"{record['place']}/{record['name']}/{record['version']}"
    return f"{record['place']}@{record['version']} (commit {record['commit'][:8]})"


def _promotions(arguments: argparse.Namespace) -> int:
    import json

    from prefbuild.promote.record import RECORD, read, table

    entries = read(_enter_project())
    if arguments.json:
        print(json.dumps(entries, indent=2))
    else:
        print(table(entries) if entries else f"nothing was promoted ({RECORD} has no line)")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from prefbuild.errors import UsageError
    from prefbuild.promote.verify import verify
    from prefbuild.resolve import find_root

    try:
        root = find_root(Path.cwd())
    except UsageError:
        root = None  # anybody may check, with the signer's public keys
    print("\n  ".join(verify(arguments.what, root=root, key=arguments.key, quick=arguments.quick).lines))
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    from prefbuild.promote import rollback

    options = {"to": arguments.to, "key": arguments.key, "replace": arguments.replace}
    record = rollback(_enter_project(), arguments.name, **options)
    print(f"rolled {arguments.name} back to {record['same_as']}, as {record['version']}: {_place(record)}")
    return 0


def _keygen(arguments: argparse.Namespace) -> int:
    from prefbuild.promote.signing import default_keys, keygen, new_passphrase

    passphrase = new_passphrase() if arguments.passphrase else None
    print("\n".join(keygen(Path(arguments.folder) if arguments.folder else default_keys(), passphrase)))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from prefbuild.doctor import doctor, doctor_text

    findings = doctor(_enter_project(), arguments.name)
    print(doctor_text(findings))
    return 1 if any(finding.state == "missing" for finding in findings) else 0


def _plan(arguments: argparse.Namespace) -> int:
    from prefbuild.forecast import forecast, forecast_json, forecast_text

    found = forecast(_enter_project(), arguments.name, gpu=arguments.gpu, gpu_memory=arguments.gpu_memory)
    print(forecast_json(found) if arguments.json else forecast_text(found))
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from prefbuild.recipe import schema_text

    sys.stdout.write(schema_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
