"""Every method on the real model on a GPU, and runs that were killed there."""

import multiprocessing
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from trained import digest, train, train_and_die, write_prepared

from prefbuild.methods import METHODS, SHAPES, TRAIN_METRICS

pytestmark = pytest.mark.gpu
SETTINGS: dict[str, Any] = {"precision": "bf16", "deterministic": True, "lora": {"r": 8}, "learning_rate": 1e-4}
# Without a reference, or with a reward of length: kl is of a beta, and a terminated length of answers that ended.
MAY_LACK = {"kl"}


@pytest.mark.parametrize(
    ("method", "how"),
    # A reward model is trained with an adapter.
    [(method, how) for method in METHODS for how in ("lora", "qlora", "full") if (method, how) != ("reward", "full")],
)
def test_two_steps_on_the_real_model(method: str, how: str, smollm2: Path, tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path / "prepared", smollm2, SHAPES[method])
    settings = SETTINGS | ({"quantization": "nf4"} if how == "qlora" else {})
    if how == "full":
        settings = {key: value for key, value in SETTINGS.items() if key != "lora"} | {"use_peft": False}
    metrics = train(tmp_path, method, smollm2, prepared, max_steps=2, **settings)
    assert metrics["steps"] == 2 and metrics["grad_norm"]["max"] > 0
    assert metrics["machine"]["precision"] == "bf16" and "NVIDIA" in metrics["machine"]["device"]
    for key in set(TRAIN_METRICS[method]) - MAY_LACK:
        value: Any = metrics
        for part in key.split("."):
            value = value[part]
        assert isinstance(value, int | float), key
    assert ("model" if how == "full" else "adapter_model") + ".safetensors" in digest(tmp_path)
    if method == "dpo":
        # By another row of tokens than the step's, which rounds otherwise.
        assert abs(metrics["step_0"]["margins"]) < 0.02


def test_packed_pairs_score_and_pull_as_padded_ones_do_in_bf16(smollm2: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from prefbuild.template import load_tokenizer
    from prefbuild.training.attention import use_packed_attention
    from prefbuild.training.fused import fuse, leave_out_unread
    from prefbuild.training.packed_model import load_model, score_rows

    # Of a chat's lengths: what rounding does to a few tokens' sum is more of it than of a hundred's.
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    ids_of_text = iter(load_tokenizer(smollm2)(text)["input_ids"])
    lengths = [(90, 70, 160), (40, 120, 60), (150, 60, 110), (60, 200, 90)]
    parts = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{part: list(islice(ids_of_text, num)) for part, num in zip(parts, row, strict=True)} for row in lengths]
    sequences = [(row["prompt_ids"], row[f"{answer}_ids"]) for row in rows for answer in ("chosen", "rejected")]
    longest = max(len(prompt) + len(answer) for prompt, answer in sequences)
    ids = torch.tensor([[*p, *a] + [0] * (longest - len(p) - len(a)) for p, a in sequences]).cuda()
    mask = torch.tensor([[1] * (len(p) + len(a)) + [0] * (longest - len(p) - len(a)) for p, a in sequences]).cuda()

    def adapted() -> Any:
        torch.manual_seed(0)
        model = load_model(METHODS["dpo"].model_validate({"method": "dpo"}), smollm2, bf16=True)
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        return model

    def pull(model: Any, sums: Any) -> Any:
        """All gradients, of the loss of pairs whose reference has given both answers the same."""
        margins = sums[0::2] - sums[1::2]
        torch.nn.functional.logsigmoid(-0.1 * margins).sum().backward()
        return torch.cat([one.grad.flatten() for one in model.parameters() if one.requires_grad])

    def padded(bf16: bool) -> tuple[Any, Any]:
        model = adapted() if bf16 else adapted().float()
        model.get_base_model().set_attn_implementation("sdpa")
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        of_tokens = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        rows_of = zip(of_tokens, sequences, strict=True)
        sums = torch.stack([row[len(p) - 1 :][: len(a)].sum() for row, (p, a) in rows_of])
        return sums.detach(), pull(model, sums)

    model = adapted()
    use_packed_attention(model.get_base_model())
    assert fuse(model) and leave_out_unread(model)
    with torch.autocast("cuda", torch.bfloat16):
        scores, counts = score_rows(model, rows)
    sums = torch.stack([one.sum() for one in scores.log_probs.split(counts)])
    ours, gradient = sums.detach(), pull(model, sums)
    (exact, exact_gradient), (theirs, their_gradient) = padded(bf16=False), padded(bf16=True)
    assert ((ours - theirs).abs() / theirs.abs()).max() < 1e-2
    losses = [-torch.nn.functional.logsigmoid(-0.1 * (one[0::2] - one[1::2])).sum().item() for one in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    # Rounding in bf16 moves a gradient further than it moves a score: ours no further than padding's own.
    errors = [((one - exact_gradient).norm() / exact_gradient.norm()).item() for one in (gradient, their_gradient)]
    assert errors[0] < 1.5 * errors[1], errors
    assert ((ours - exact).abs() / exact.abs()).max() < 1e-2


KILLED = {
    "dpo": {"lora": {"r": 8, "lora_dropout": 0.1}, "disable_dropout": False},  # by TRL, and with random numbers
    "dpo packed": {"lora": {"r": 8}},
    "grpo": {"lora": {"r": 8, "lora_dropout": 0.1}, "disable_dropout": False},
}


@pytest.mark.parametrize("which", KILLED)
def test_a_killed_training_goes_on_and_ends_with_the_bytes_of_another(
    which: str, smollm2: Path, tmp_path: Path
) -> None:
    method = which.split()[0]
    prepared = write_prepared(tmp_path / "prepared", smollm2, SHAPES[method])
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    settings = SETTINGS | {"max_steps": 5, "save_steps": 2} | KILLED[which]
    train(straight, method, smollm2, prepared, **settings)
    # A GPU that is in use can't be forked.
    process = multiprocessing.get_context("spawn").Process(
        target=train_and_die, args=(3, killed, method, smollm2, prepared), kwargs=settings
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in (killed / "work").glob("checkpoint-*")] == ["checkpoint-2"]
    train(killed, method, smollm2, prepared, **settings)
    assert digest(killed) == digest(straight)
