"""prefbuild/merging.py: streamed files are those of PEFT and save_pretrained, byte for byte, in little memory."""

import filecmp
import hashlib
import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from project import ROOT

from prefbuild.errors import StageError
from prefbuild.merging import NotCovered, stream_merge
from prefbuild.stages.merge import merge


def make_base(folder: Path, *, dtype: str = "bfloat16", tied: bool = True, size: str = "50GB", **config: Any) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 101, **config}
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, **shape),
        dtype=getattr(torch, dtype),
    )
    model.save_pretrained(folder, max_shard_size=size)
    return folder


def make_adapter(folder: Path, base: Path, std: float = 0.02, **config: Any) -> Path:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:  # magnitudes too, or DoRA would not be tried
            parameter.data += torch.randn_like(parameter) * std
    adapted.save_pretrained(folder)
    return folder


def save_with_peft(base: Path, adapter: Path, folder: Path, size: str = "50GB") -> Path:
    import peft
    from transformers import AutoModelForCausalLM

    pair = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
    pair.merge_and_unload(safe_merge=True).save_pretrained(folder, max_shard_size=size)
    if (base / "generation_config.json").exists():
        shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")
    return folder


def assert_same_files(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        ({}, {}),
        ({"dtype": "float16"}, {}),
        ({"dtype": "float32"}, {}),
        ({"tied": False}, {}),
        ({"attention_bias": True}, {"target_modules": ["v_proj", "down_proj"]}),
        ({}, {"use_rslora": True, "r": 6}),
        ({}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 32}}),
        ({}, {"use_dora": True}),
        ({"dtype": "float32"}, {"use_dora": True}),
        ({"size": "50KB"}, {}),
    ],
    ids=["bf16", "fp16", "fp32", "untied", "biases", "rslora", "patterns", "dora", "dora32", "shards"],
)
@pytest.mark.parametrize("size", ["50GB", "60KB"])
def test_streamed_files_are_those_of_peft(base: Any, adapter: Any, size: str, tmp_path: Path) -> None:
    model = make_base(tmp_path / "base", **base)
    trained = make_adapter(tmp_path / "adapter", model, **adapter)
    digests = merge(model, trained, tmp_path / "streamed", size)
    assert_same_files(tmp_path / "streamed", save_with_peft(model, trained, tmp_path / "peft", size))
    files = set((tmp_path / "streamed").glob("*.safetensors"))
    assert set(digests) == files
    assert len(files) == 1 if size == "50GB" else len(files) > 2
    for path, digest in digests.items():
        data = path.read_bytes()
        assert digest.size == len(data)
        assert digest.sha256 == hashlib.sha256(data).hexdigest()
        assert digest.md5 == hashlib.md5(data).hexdigest()


@pytest.mark.parametrize("size", ["50GB", "60KB"])
def test_weights_that_lie_crosswise_are_merged_as_peft_does(size: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=101, n_positions=64, dtype="bfloat16")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    trained = make_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["c_attn"], fan_in_fan_out=True)
    assert merge(tmp_path / "base", trained, tmp_path / "streamed", size)
    assert_same_files(tmp_path / "streamed", save_with_peft(tmp_path / "base", trained, tmp_path / "peft", size))


def test_adapter_stored_in_bf16_is_merged_as_peft_does(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model = make_base(tmp_path / "base")
    trained = make_adapter(tmp_path / "adapter", model)
    file = trained / "adapter_model.safetensors"
    save_file({key: tensor.to(torch.bfloat16) for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert merge(model, trained, tmp_path / "streamed")
    assert_same_files(tmp_path / "streamed", save_with_peft(model, trained, tmp_path / "peft"))


def test_real_model_is_streamed_to_the_files_of_peft(smollm2: Path, tmp_path: Path) -> None:
    trained = make_adapter(tmp_path / "adapter", smollm2)
    assert stream_merge(smollm2, trained, tmp_path / "streamed", "100MB")
    expected = save_with_peft(smollm2, trained, tmp_path / "peft", "100MB")
    (expected / "generation_config.json").unlink()  # the stage copies the base's
    assert_same_files(tmp_path / "streamed", expected)


def test_base_without_a_generation_config_gets_that_of_save_pretrained(tmp_path: Path) -> None:
    model = make_base(tmp_path / "base", eos_token_id=7)
    (model / "generation_config.json").unlink()
    trained = make_adapter(tmp_path / "adapter", model)
    assert merge(model, trained, tmp_path / "streamed")
    assert json.loads((tmp_path / "streamed/generation_config.json").read_text())["eos_token_id"] == 7
    assert_same_files(tmp_path / "streamed", save_with_peft(model, trained, tmp_path / "peft"))


def make_mixed(folder: Path) -> Path:
    """A base with its norms in float32."""
    import torch
    from safetensors.torch import load_file, save_file

    file = make_base(folder) / "model.safetensors"
    tensors = load_file(file)
    save_file({name: t.to(torch.float32) if "norm" in name else t for name, t in tensors.items()}, file)
    return folder


def make_stored_twice(folder: Path) -> Path:
    """A base whose file has the tied output layer as well."""
    from safetensors.torch import load_file, save_file

    file = make_base(folder) / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("make", "adapter", "why"),
    [
        (make_mixed, {}, "its tensors are not all in bfloat16"),
        (make_stored_twice, {}, "its tensors have other names or shapes in memory"),
        (
            lambda folder: make_base(folder, tied=False),
            {"target_modules": ["embed_tokens", "q_proj"]},
            "embed_tokens.base_layer.weight is not of a linear layer's LoRA",
        ),
        (
            lambda folder: make_base(folder, tied=False),
            {"target_modules": ["lm_head", "q_proj"]},
            "lm_head.base_layer.weight is not of a linear layer's LoRA",
        ),
        (make_base, {"modules_to_save": ["norm"]}, "norm.weight is not of a linear layer's LoRA"),
        (
            lambda folder: make_base(folder, attention_bias=True),
            {"lora_bias": True, "target_modules": ["q_proj"]},
            "q_proj.lora_B.bias is not of a linear layer's LoRA",
        ),
    ],
    ids=["mixed", "stored twice", "embedding", "lm_head", "modules_to_save", "lora_bias"],
)
def test_what_is_not_covered_is_left_to_peft(
    make: Callable[[Path], Path], adapter: Any, why: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = make(tmp_path / "base")
    trained = make_adapter(tmp_path / "adapter", model, **adapter)
    with pytest.raises(NotCovered, match=why):
        stream_merge(model, trained, tmp_path / "streamed", "50GB")
    assert not (tmp_path / "streamed").exists()
    assert merge(model, trained, tmp_path / "merged") == {}
    assert why in capfd.readouterr().err
    for path in save_with_peft(model, trained, tmp_path / "peft").glob("*.safetensors"):
        assert filecmp.cmp(path, tmp_path / "merged" / path.name, shallow=False)


def test_update_too_large_for_the_format_is_refused(tmp_path: Path) -> None:
    model = make_base(tmp_path / "base", dtype="float16")
    trained = make_adapter(tmp_path / "adapter", model, std=300.0)
    with pytest.raises(StageError, match=r"adapter: can't be merged into .*base: .*_proj.weight would hold NaN or inf"):
        stream_merge(model, trained, tmp_path / "merged", "50GB")


def test_adapter_that_lacks_layers_is_left_to_peft(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make_base(tmp_path / "base")
    trained = make_adapter(tmp_path / "adapter", model)
    file = trained / "adapter_model.safetensors"
    kept = {key: tensor for key, tensor in load_file(file).items() if "layers.1.mlp.up_proj" not in key}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(NotCovered, match="does not have all of its layers"):
        stream_merge(model, trained, tmp_path / "merged", "50GB")


def test_base_that_ends_early_is_noticed(tmp_path: Path) -> None:
    model = make_base(tmp_path / "base")
    trained = make_adapter(tmp_path / "adapter", model)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(OSError, match=r"model.safetensors: ends in the middle of a tensor"):
        stream_merge(model, trained, tmp_path / "merged", "50GB")


def test_benchmark_compares_both_ways(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks/merge.py", tmp_path / "new", "--layers", "1", "--hidden", "128"]
    done = subprocess.run([*command, "--vocabulary", "100"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[-3:]] == ["whole", "streamed", "both"]


MEASURE = """
    import json, sys
    from pathlib import Path
    from prefbuild.stages.merge import merge

    def most():  # bytes this process has had in memory since its peak was forgotten
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

    tiny, large = (Path(folder) for folder in sys.argv[1:3])
    merge(tiny / "base", tiny / "adapter", tiny / "merged")  # imports all there is
    Path("/proc/self/clear_refs").write_text("5")
    before = most()
    merge(large / "base", large / "adapter", large / "merged")
    print(json.dumps({"grown": most() - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a process' peak can be forgotten on Linux only")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    for name, config in {
        "tiny": {},
        "large": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 48},
    }.items():
        model = make_base(tmp_path / name / "base", **config)
        make_adapter(tmp_path / name / "adapter", model)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), tmp_path / "tiny", tmp_path / "large"],
        capture_output=True,
        text=True,
        check=True,
    )
    grown = json.loads(done.stdout)["grown"]
    size = (tmp_path / "large/base/model.safetensors").stat().st_size
    assert size > 280e6
    # Adapter, modules and a few tensors of 1.4 MB: 39 MB here. Of PEFT with the whole model: 590 MB.
    assert grown < size / 3, f"{grown / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"
