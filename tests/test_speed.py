"""benchmarks/speed.py and curves.py on a CPU with tiny models, and the arithmetic of their table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from material import read_pairs, shortened, write_result
from project import ROOT
from speed_table import summarise_grpo, useful, weights
from steps import covered, kind

MISTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32002,
}


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *arguments], capture_output=True, text=True, timeout=280
    )


def test_all_arms_train_on_the_same_rows_in_the_same_order(smollm2: Path, real_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    rows, prompts = real_data / "preference/orca_dpo_pairs_284.jsonl", real_data / "prompts/tldr_100.jsonl"
    asked = ["--tokenizer", smollm2, "--rows", rows, "--prompts", prompts, "--out", out, "--quick"]
    done = run("speed.py", tmp_path / "work", *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert {"dpo", "grpo", "machine", "command", "ceiling"} <= found.keys()
    assert str(tmp_path) not in out.read_text()  # a committed result names no folder of the machine it came from
    dpo, grpo = found["dpo"]["arms"], found["grpo"]["arms"]
    assert (list(dpo), list(grpo)) == (["article", "tuned", "ours"], ["hf", "graph"])
    for arm in ("article", "tuned"):
        assert dpo[arm]["losses"] == pytest.approx(dpo["ours"]["losses"][:3], abs=2e-5)
        assert dpo[arm]["chosen_log_probs"] == pytest.approx(dpo["ours"]["chosen_log_probs"][:3], rel=1e-4)
    assert len(set(dpo["ours"]["chosen_log_probs"])) == 4  # so steps had other rows each
    assert len(dpo["ours"]["seconds"]) == 3 and len(dpo["ours"]["losses"]) == 4
    assert dpo["ours"]["total_s"] > dpo["ours"]["total_with_cached_reference_s"]
    for arm in grpo.values():
        lengths = arm["metrics"]["completions"]
        assert lengths["min_length"] == lengths["max_length"] == 8 and lengths["clipped_ratio"] == 1
    assert "a step of ours is" in done.stdout and "the floor of a step" in done.stdout


def test_both_engines_draw_one_curve(tiny_model: Path, real_data: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "curves.json", tmp_path / "curves.svg"
    rows = real_data / "preference/orca_dpo_pairs_284.jsonl"
    asked = ["--model", tiny_model, "--rows", rows, "--out", out, "--picture", picture, "--quick"]
    done = run("curves.py", tmp_path / "work", *asked, "--steps", "3", "--precision", "float32")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    packed, trl = (found["runs"][name]["curves"]["loss"] for name in ("packed", "TRL"))
    assert packed == [pytest.approx(point, rel=1e-4) for point in trl] and trl[0][1] != trl[2][1]
    assert picture.read_text().count("<polyline") == 10  # of three runs, and of what two differ by, twice


def test_flops_are_those_of_the_formula() -> None:
    layers, head, adapter = weights(MISTRAL)
    assert (layers, head, 16 * adapter) == (6_979_321_856, 4096 * 32002, 41_943_040)
    # Forward, backward to the inputs and the reference's forward, 2 a weight each; 6 a weight of the adapter.
    assert useful(MISTRAL, 1, 0, 3) == 6 * layers + 6 * 16 * adapter
    assert useful(MISTRAL, 0, 1, 2) == 4 * head


def test_the_floor_of_grpo_is_bytes_and_flops() -> None:
    shape = MISTRAL | {"num_hidden_layers": 1}
    grpo = {
        "arms": {
            "hf": {"load_s": 2.0, "step_s": 4.0, "median_step_s": 4.0},
            "graph": {"load_s": 1.0, "step_s": 0.1, "median_step_s": 0.1},
        },
        "shape": shape,
        "rows": {"completion_tokens": 10, "mean_tokens": 100},
    }
    summarise_grpo(grpo, {"copy_gb_per_s": 1000, "matmul_tflops": 100})
    layers, head, _ = weights(shape)
    cached = 16 * (100 + 5) * 2 * 2 * 8 * 128  # keys and values of 8 heads in bf16, for every completion
    assert grpo["a_step"]["floor_decode_s"] == pytest.approx(10 * (2 * (layers + head) + cached) / 1e12, abs=1e-5)
    assert grpo["ratios"] == {"hf": 40.0}
    assert grpo["arms"]["graph"]["epoch_s"] == 101.0  # 1,000 steps and the start


@pytest.mark.parametrize(
    ("kernel", "wanted"),
    [
        ("void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", "attention"),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNN", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix products"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4>", "other kernels"),
    ],
)
def test_a_kernel_is_told_by_its_name(kernel: str, wanted: str) -> None:
    assert kind(kernel) == wanted


def test_time_that_two_kernels_share_is_busy_once() -> None:
    assert covered([(5, 7), (0, 2), (1, 4)]) == 6


def test_pairs_are_rendered_as_the_prepare_stage_does(smollm2: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"system": "", "question": "Why?", "chosen": "Yes.", "rejected": "No."}) + "\n")
    (pair,) = read_pairs(smollm2, rows, 1536)
    assert pair["prompt"].endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    assert pair["chosen"] == "Yes.<|im_end|>\n" and read_pairs(smollm2, rows, 10) == []
    assert len(shortened([pair])[0]["prompt_ids"]) == 8


def test_numbers_of_a_list_are_on_one_line(tmp_path: Path) -> None:
    write_result(tmp_path / "new/found.json", {"seconds": [1, -2.5e-07], "names": ["a"]})
    assert '"seconds": [1, -2.5e-07],' in (tmp_path / "new/found.json").read_text()
