"""How large a model is: from its config, from a GGUF's header, or guessed from the size of its file.

Not covered: mixtures of experts, and layers that are not attention and a gated MLP; their numbers are bounds at best.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefbuild.sources import node_id

if TYPE_CHECKING:
    from prefbuild.recipe import Recipe
    from prefbuild.resolve import Project

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Bits a weight in GGUF's formats, by what file names call them.
GGUF_BITS = {
    "F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "Q6_K": 6.56, "Q5_1": 6.0, "Q5_0": 5.5, "Q5_K": 5.5,
    "Q4_1": 5.0, "Q4_0": 4.5, "Q4_K": 4.5, "Q3_K": 3.44, "Q2_K": 2.63,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model's size. `source` says where the numbers are from; a guess says so."""

    num_parameters: int
    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool  # whether lm_head is the embeddings
    source: str

    @property
    def queries(self) -> int:
        """Numbers in a token's queries of one layer."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Numbers in a token's keys of one layer; values are as many."""
        return self.kv_heads * self.head_dim

    @property
    def linear(self) -> list[tuple[int, int]]:
        """(in, out) of the linear layers of one layer: q, k, v, o, gate, up, down."""
        h, q, k, i = self.hidden, self.queries, self.keys, self.intermediate
        return [(h, q), (h, k), (h, k), (q, h), (h, i), (h, i), (i, h)]

    @property
    def linear_weights(self) -> int:
        """Weights in the linear layers of all layers: what 4 bits are for, and what nearly all FLOPs are of."""
        return self.layers * sum(a * b for a, b in self.linear)


def shape_of(project: "Project", recipe: "Recipe") -> ModelShape:
    """The base's shape: from its config where that is on disk, from a GGUF's header, else guessed from file sizes."""
    base = root_base(project, recipe)
    source = base.model_dump(mode="json")
    node = node_id(source)
    fetched = project.root / "build/models" / node
    path = project.root / source.get("path", "")
    if (fetched / "config.json").exists():
        return shape_of_checkpoint(fetched)
    if base.source == "file" and (path / "config.json").exists():
        return shape_of_checkpoint(path)
    if base.source == "file" and path.suffix == ".gguf" and path.is_file():
        return _shape_of_gguf(path)
    files = {file["path"]: file["size"] for file in locked_files(project, node)}
    weights = {name: size for name, size in files.items() if name.endswith((".safetensors", ".gguf", ".bin"))}
    if not weights:
        return guess_shape(0, "its size is unknown, because the base is not pinned")
    num_bits = min(gguf_bits(name) if name.endswith(".gguf") else 8 * BYTES[base.dtype] for name in weights)
    return guess_shape(int(sum(weights.values()) * 8 / num_bits), "a guess from the size of the locked file")


def shape_of_checkpoint(folder: Path) -> ModelShape:
    """A checkpoint folder's shape, from config.json and the headers of its safetensors files."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return shape_of_config(config, sum(map(_num_elements, folder.glob("*.safetensors"))))


def shape_of_config(config: dict[str, Any], num_parameters: int) -> ModelShape:
    """A shape from what config.json says, and the number of weights. What a config lacks is guessed from that number."""
    config = config.get("text_config", config)
    guess = guess_shape(num_parameters, "by the model's config")
    hidden = config.get("hidden_size", guess.hidden)
    heads = config.get("num_attention_heads") or max(1, hidden // 64)
    return ModelShape(
        num_parameters=num_parameters,
        hidden=hidden,
        layers=config.get("num_hidden_layers", guess.layers),
        intermediate=config.get("intermediate_size") or 4 * hidden,
        vocabulary=config.get("vocab_size", guess.vocabulary),
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or max(1, hidden // heads),
        tied=bool(config.get("tie_word_embeddings", False)),
        source=guess.source,
    )


def gguf_bits(name: str) -> float:
    """Bits a weight by a GGUF's file name; 4.5 where it does not say, so that a guess is rather too large."""
    found = [bits for kind, bits in GGUF_BITS.items() if re.search(rf"(?i)(?<![a-z0-9]){kind}(?![0-9])", name)]
    return found[0] if found else 4.5


def guess_shape(num_parameters: int, source: str) -> ModelShape:
    """A usual transformer of that many weights: 12 x layers x hidden^2 of them, hidden = 64 x layers, 100k words."""
    hidden = int((64 * max(num_parameters, 1) / 12) ** (1 / 3))
    heads = max(1, math.ceil(hidden / 64))
    return ModelShape(
        num_parameters=num_parameters,
        hidden=hidden,
        layers=heads,
        intermediate=3 * hidden,
        vocabulary=100_000,
        heads=heads,
        kv_heads=heads,
        head_dim=max(1, hidden // heads),
        tied=False,
        source=source,
    )


def _num_elements(path: Path) -> int:
    """Numbers in a safetensors file, from its header."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for key, tensor in header.items() if key != "__metadata__")


def _shape_of_gguf(path: Path) -> ModelShape:
    from gguf import GGUFReader

    reader: Any = GGUFReader(str(path))

    def field(key: str) -> int | None:
        found = next((value for name, value in reader.fields.items() if name.endswith(f".{key}")), None)
        return int(found.contents()) if found is not None else None

    embedding = next((tensor for tensor in reader.tensors if tensor.name == "token_embd.weight"), None)
    config = {
        "hidden_size": field("embedding_length"),
        "num_hidden_layers": field("block_count"),
        "intermediate_size": field("feed_forward_length"),
        "vocab_size": int(max(embedding.shape)) if embedding is not None else None,
        "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "head_dim": field("attention.key_length"),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
    }
    known = {key: value for key, value in config.items() if value is not None}
    shape = shape_of_config(known, sum(int(tensor.n_elements) for tensor in reader.tensors))
    return ModelShape(**{**vars(shape), "source": "by the GGUF's header"})


def root_base(project: "Project", recipe: "Recipe") -> Any:
    """The file, wheel or repository at the root of a recipe's base: a merged model has its base's shape."""
    while recipe.base.source == "recipe":
        recipe = project.recipes[recipe.base.recipe]
    return recipe.base


def locked_files(project: "Project", node: str) -> list[dict[str, Any]]:
    """The locked files of a source; none when it is not pinned."""
    files: list[dict[str, Any]] = project.lock["sources"].get(node, {}).get("files", [])
    return files
