"""prefbuild/stages/merge.py: the merged folder is base and adapter, and nothing else gets through."""

import hashlib
import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefbuild.artifact import read_manifest, verify_artifact, write_manifest
from prefbuild.digests import Digests
from prefbuild.errors import StageError
from prefbuild.stages import merge

Change = Callable[[str, Any], None]


def make_adapter(folder: Path, base: Path, change: Change, **config: Any) -> Path:
    """An adapter as the train stage leaves it; `change(name, parameter)` fills each of its tensors in place."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                change(name, parameter)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink()
    write_manifest(folder, stage="train", name="test", inputs={"model": read_manifest(base)["digest"]})
    return folder


def normal(name: str, parameter: Any) -> None:
    parameter.normal_(std=0.02)


def run(folder: Path, base: Path, adapter: Path, max_kl: float = 0.01) -> Path:
    outputs = {"merged": folder / "merged", "metrics": folder / "merge.json"}
    inputs: dict[str, Any] = {"model": base, "adapter": adapter}
    merge.run({"merge": {"max_kl": max_kl}}, inputs, outputs, folder / "work", "test")
    return outputs["merged"]


@pytest.fixture(scope="module")
def adapter(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter"), smollm2, normal)


@pytest.fixture(scope="module")
def merged(smollm2: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("merge"), smollm2, adapter)


@pytest.fixture
def one_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof on one prompt, for tests that only need it to fail."""
    monkeypatch.setattr(merge, "PROMPTS", merge.PROMPTS[:1])


def test_merged_weights_are_those_of_peft(smollm2: Path, adapter: Path, merged: Path) -> None:
    import peft
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    expected = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload(safe_merge=True).state_dict()
    found = load_file(merged / "model.safetensors")
    before = load_file(smollm2 / "model.safetensors")
    # The embeddings are tied, so the output layer is not stored a second time.
    assert set(expected) - set(found) == {"lm_head.weight"}
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name]), name
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert changed == {name for name in found if "_proj" in name}


def test_merged_folder_is_a_checkpoint_and_nothing_more(smollm2: Path, merged: Path) -> None:
    files = {path.relative_to(merged).as_posix() for path in merged.rglob("*")}
    text = {"chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert files == {"config.json", "model.safetensors"} | text
    for name in text:
        assert (merged / name).read_bytes() == (smollm2 / name).read_bytes()
    for path in merged.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444, f"{path} can't be read by all"


def test_metrics_say_how_near_it_is(merged: Path) -> None:
    metrics = json.loads((merged.parent / "merge.json").read_text())
    assert set(metrics) == {"kl", "max_logit_difference", "greedy_agreement", "tolerance", "bytes"}
    assert 1e-7 < metrics["kl"] < 0.01
    assert 0 < metrics["max_logit_difference"] < 2
    assert metrics["greedy_agreement"] >= 0.5
    assert metrics["tolerance"] == {"max_kl": 0.01}
    assert metrics["bytes"] == sum(path.stat().st_size for path in merged.iterdir())


def test_merged_model_answers_as_base_and_adapter_do(smollm2: Path, adapter: Path, merged: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    messages = [{"role": "user", "content": "Which colour is grass?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    alone = base.generate(ids, do_sample=False, max_new_tokens=12)
    pair = peft.PeftModel.from_pretrained(base, adapter).generate(input_ids=ids, do_sample=False, max_new_tokens=12)
    one = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    answer = one.generate(ids, do_sample=False, max_new_tokens=12)
    assert answer.tolist() == pair.tolist()
    assert answer.tolist() != alone.tolist()


def test_base_that_was_not_trained_on_is_refused_with_both_digests(
    smollm2: Path, adapter: Path, tmp_path: Path
) -> None:
    other = "sha256:" + "0" * 64
    copy = tmp_path / "adapter"
    shutil.copytree(adapter, copy)
    write_manifest(copy, stage="train", name="test", inputs={"model": other})
    with pytest.raises(StageError) as error:
        run(tmp_path, smollm2, copy)
    assert f"digest {other}" in str(error.value)
    assert read_manifest(smollm2)["digest"] in str(error.value)
    assert not (tmp_path / "merged").exists()


def test_changed_adapter_is_refused(smollm2: Path, adapter: Path, tmp_path: Path) -> None:
    copy = tmp_path / "adapter"
    shutil.copytree(adapter, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 400}))
    with pytest.raises(StageError, match=r"adapter_config.json: sha256 is \w+, the manifest says"):
        run(tmp_path, smollm2, copy)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:-1000]], ids=["a bit", "its end"]
)
def test_changed_base_is_refused(tiny_model: Path, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    write_manifest(base, stage="model", name="test", inputs={})
    adapter = make_adapter(tmp_path / "adapter", base, normal)
    weights = base / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(StageError, match=r"base/model.safetensors: sha256 is \w+, the manifest says"):
        run(tmp_path, base, adapter)
    assert not (tmp_path / "merge.json").exists()


def test_manifest_of_what_was_merged_needs_no_second_reading(smollm2: Path, merged: Path) -> None:
    hashed = Digests(merged.parent / "work")
    assert [Path(path).name for path in hashed.files] == ["model.safetensors"]
    (digest,) = hashed.files.values()
    assert digest.sha256 == hashlib.sha256((merged / "model.safetensors").read_bytes()).hexdigest()
    manifest = write_manifest(merged.parent / "merged", stage="merge", name="test", inputs={}, sha256=hashed.sha256)
    assert verify_artifact(merged) == manifest
    (merged / "manifest.json").unlink()  # other tests look at the folder as the stage leaves it


def test_quantised_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    digest = write_manifest(base, stage="model", name="test", inputs={})["digest"]
    copy = tmp_path / "adapter"
    shutil.copytree(adapter, copy)
    write_manifest(copy, stage="train", name="test", inputs={"model": digest})
    with pytest.raises(StageError, match=r"base/config.json: the base is quantised"):
        run(tmp_path, base, copy)


@pytest.mark.parametrize(
    ("value", "message"),
    [(0.0, r"all 210 lora_B tensors are zero, as before training"), (float("nan"), r"holds NaN or infinity")],
)
def test_adapter_that_learnt_nothing_or_broke_is_refused(
    smollm2: Path, tmp_path: Path, value: float, message: str
) -> None:
    adapter = make_adapter(tmp_path / "adapter", smollm2, lambda name, parameter: parameter.fill_(value))
    with pytest.raises(StageError, match=message):
        run(tmp_path, smollm2, adapter)


@pytest.mark.usefixtures("one_prompt")
def test_update_lost_in_rounding_is_refused(smollm2: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", smollm2, lambda name, parameter: parameter.fill_(1e-9))
    with pytest.raises(StageError, match=r"is no nearer to base and adapter .* what was trained is lost in rounding"):
        run(tmp_path, smollm2, adapter)
    assert not (tmp_path / "merge.json").exists()


@pytest.mark.usefixtures("one_prompt")
def test_too_tight_max_kl_fails_with_the_figures(smollm2: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError) as error:
        run(tmp_path, smollm2, adapter, max_kl=1e-9)
    text = str(error.value)
    assert "nats a token is over merge.max_kl 1e-09" in text
    assert "prompts continue alike" in text
    assert "base.dtype: float32" in text
    assert not (tmp_path / "merge.json").exists()


def test_adapter_on_one_of_two_tied_layers_is_refused(smollm2: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", smollm2, normal, target_modules=["lm_head"])
    with pytest.raises(StageError, match=r"adapts an embedding that .* uses as input and as output"):
        run(tmp_path, smollm2, adapter)


@pytest.mark.usefixtures("one_prompt")
def test_embeddings_that_came_apart_are_noticed(smollm2: Path, adapter: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    apart = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16, tie_word_embeddings=False)
    apart.lm_head.weight = torch.nn.Parameter(apart.model.embed_tokens.weight.clone())
    apart.save_pretrained(tmp_path / "apart")
    with pytest.raises(
        StageError, match=r"apart: input and output embeddings are not one tensor, but in .* they are so"
    ):
        merge.compare(smollm2, adapter, tmp_path / "apart")
