"""What the arms of speed.py found, set against each other and against what the machine can do."""

import statistics
from typing import Any

PAIRS = 16  # a step, of DPO
STEPS = 200  # of the article
PROMPTS, COMPLETIONS = 2, 16  # a step, of GRPO
EPOCH = 1000  # GRPO's steps over 2,000 prompts
GIB = 2**30


def summarise(found: dict[str, Any], warm_up: int) -> None:
    """Add to each arm its `step_s` and share of the ceiling, and to `dpo` and `grpo` ratios and floors."""
    for part in ("dpo", "grpo"):
        for arm in found[part]["arms"].values():
            if "seconds" in arm:
                arm["step_s"] = round(statistics.fmean(arm["seconds"][warm_up - 1 :]), 4)
                arm["median_step_s"] = round(statistics.median(arm["seconds"][warm_up - 1 :]), 4)
    summarise_dpo(found["dpo"], found["ceiling"], warm_up)
    summarise_grpo(found["grpo"], found["ceiling"])


# ---- what it takes


def weights(shape: dict[str, Any]) -> tuple[int, int, int]:
    """(linear weights of all layers, of the head, of an adapter of rank 1 on all of a layer's projections)."""
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    head = shape.get("head_dim") or hidden // shape["num_attention_heads"]
    queries, keys = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    sizes = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)] + [(hidden, inner)] * 3
    return (
        layers * sum(one * other for one, other in sizes),
        hidden * shape["vocab_size"],
        layers * sum(one + other for one, other in sizes),
    )


def useful(shape: dict[str, Any], tokens: float, scored: float, passes: int, rank: int = 16) -> float:
    """FLOPs that a LoRA step can't do without, of `tokens` through the layers and `scored` through the head.

    Two a weight and token for each pass: forward, backward (to the inputs alone, since the weights are frozen), and the
    reference's forward where that is the third. The adapter's weights take part in forward, and twice in backward.
    Attention's own products, 1 to 3 % at these lengths, are left out.
    """
    layers, head, adapter = weights(shape)
    return passes * 2 * (layers * tokens + head * scored) + 6 * rank * adapter * tokens


def summarise_dpo(dpo: dict[str, Any], ceiling: dict[str, float], warm_up: int) -> None:
    arms, shape = dpo["arms"], dpo["shape"]
    prompt, chosen, rejected = (PAIRS * dpo["rows"]["mean_tokens"][part] for part in ("prompt", "chosen", "rejected"))
    tokens, scored, peak = prompt + chosen + rejected, chosen + rejected, 1e12 * ceiling["matmul_tflops"]
    flops = {passes: useful(shape, tokens, scored, passes) for passes in (2, 3)}
    dpo["a_step"] = {
        "tokens_prompt_once": round(tokens),
        "tokens_prompt_twice": round(tokens + prompt),
        "useful_tflop": round(flops[3] / 1e12, 2),
        "floor_s": round(flops[3] / peak, 4),
        "floor_without_reference_s": round(flops[2] / peak, 4),
    }
    for name, arm in arms.items():
        if "step_s" in arm:
            # Ours has its reference log-probabilities before the first step; TRL computes them in each.
            passes = 2 if name in ("ours", "deterministic") else 3
            arm["share_of_ceiling"] = round(flops[passes] / arm["step_s"] / peak, 4)
        if "padded_tokens" in arm:
            arm["padded_tokens_a_step"] = round(statistics.fmean(arm["padded_tokens"]))
    dpo["ratios"] = {}
    ours = arms.get("ours", {})
    if "step_s" not in ours:
        return
    ours["total_s"] = ours["wall_s"]
    ours["total_with_cached_reference_s"] = round(ours["wall_s"] - ours["reference_s"], 1)
    ours["reference_a_step_s"] = round(ours["reference_s"] / (len(ours["seconds"]) + 1), 4)
    if "step_s" in (strict := arms.get("deterministic", {})):
        timed = slice(warm_up - 1, min(len(strict["seconds"]), len(ours["seconds"])))
        dpo["deterministic"] = {
            "one_digest": strict["adapter_sha256"] == strict["again_sha256"],
            "cost": round(sum(strict["seconds"][timed]) / sum(ours["seconds"][timed]) - 1, 4),
        }
    for name in ("article", "tuned"):
        if "step_s" in (other := arms.get(name, {})):
            number = len(other["seconds"])
            same = sum(ours["seconds"][warm_up - 1 : number])
            took = sum(other["seconds"][warm_up - 1 :])
            timed = number - warm_up + 1
            dpo["ratios"][name] = {
                "same_steps": round(took / same, 2),
                "same_steps_reference_counted": round(took / (same + timed * ours["reference_a_step_s"]), 2),
                "mean_of_all_steps": round(other["step_s"] / ours["step_s"], 2),
                "losses_differ_by": max(abs(a - b) for a, b in zip(other["losses"], ours["losses"], strict=False)),
                "chosen_log_probs_differ_by": max(
                    abs(a / b - 1) for a, b in zip(other["chosen_log_probs"], ours["chosen_log_probs"], strict=False)
                ),
            }


def summarise_grpo(grpo: dict[str, Any], ceiling: dict[str, float]) -> None:
    arms, shape, rows = grpo["arms"], grpo["shape"], grpo["rows"]
    layers, head, _ = weights(shape)
    written, prompt = rows["completion_tokens"], rows["mean_tokens"]
    width = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    cached = 2 * 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * width  # bytes a token, bf16
    bytes_a_token = 2 * (layers + head) + COMPLETIONS * cached * (prompt + written / 2)
    tokens = PROMPTS * prompt + COMPLETIONS * written
    flops = useful(shape, tokens, COMPLETIONS * written, 3) + 2 * layers * PROMPTS * prompt
    decode, rest = written * bytes_a_token / (1e9 * ceiling["copy_gb_per_s"]), flops / (1e12 * ceiling["matmul_tflops"])
    grpo["a_step"] = {"floor_s": round(decode + rest, 5), "floor_decode_s": round(decode, 5)}
    for arm in arms.values():
        if "step_s" in arm:
            arm["epoch_s"] = round(arm["load_s"] + EPOCH * arm["median_step_s"], 1)
            arm["share_of_floor"] = round(grpo["a_step"]["floor_s"] / arm["median_step_s"], 4)
    grpo["ratios"] = {}
    if all("step_s" in arms.get(name, {}) for name in ("hf", "graph")):
        grpo["ratios"]["hf"] = round(arms["hf"]["median_step_s"] / arms["graph"]["median_step_s"], 2)


# ---- the table


def table(found: dict[str, Any]) -> str:
    """The whole of it for people."""
    ceiling = found["ceiling"]
    gpu = found["machine"]["gpu"] or "no GPU"
    lines = [
        f"{gpu}: {ceiling['matmul_tflops']:g} TFLOP/s of matrix products, copies of {ceiling['copy_gb_per_s']:g} GB/s"
    ]
    return "\n".join(
        [*lines, "", *dpo_lines(found["dpo"]), "", *grpo_lines(found["grpo"]), "", f"{found['seconds']:.0f} s in all"]
    )


def dpo_lines(dpo: dict[str, Any]) -> list[str]:
    once, twice = dpo["a_step"]["tokens_prompt_once"], dpo["a_step"]["tokens_prompt_twice"]
    lines = [
        f"DPO, {PAIRS} pairs a step: {once} tokens with each prompt once, {twice} with it twice",
        f"{'arm':24} {'s a step':>9} {f'{STEPS} steps':>10} {'of ceiling':>11} {'peak GiB':>9} {'tokens a step':>14}",
    ]
    names = {
        "article": "the article's settings",
        "tuned": "TRL's best",
        "ours": "ours",
        "deterministic": "ours, deterministic",
    }
    for name, arm in dpo["arms"].items():
        title = names[name] + (f", {arm['micro_batches']}" if "micro_batches" in arm else "")
        if "step_s" not in arm:
            lines.append(f"{title:24} {arm['failed']}")
            continue
        tokens = f"{arm.get('padded_tokens_a_step', once)}" + (" padded" if "padded_tokens_a_step" in arm else "")
        lines.append(
            f"{title:24} {arm['step_s']:9.3f} {STEPS * arm['step_s'] / 60:6.1f} min {arm['share_of_ceiling']:11.1%} "
            f"{arm['peak_memory'] / GIB:9.1f} {tokens:>14}"
        )
    lines += [
        f"{'':24} TRL with {name}: {what}" for name, what in dpo["arms"].get("tuned", {}).get("others", {}).items()
    ]
    for name, ratio in dpo["ratios"].items():
        lines.append(
            f"a step of ours is {ratio['same_steps']} times as fast as with {names[name]} on the same steps "
            f"({ratio['same_steps_reference_counted']} with its reference pass counted); "
            f"of the same rows: chosen answers' log-probabilities are at most {ratio['chosen_log_probs_differ_by']:.2g} of "
            f"themselves apart, losses {ratio['losses_differ_by']:.2g}"
        )
    ours = dpo["arms"].get("ours", {})
    if "total_s" in ours:
        number = len(ours["seconds"]) + 1
        floors = dpo["a_step"]["floor_s"], dpo["a_step"]["floor_without_reference_s"]
        lines += [
            f"ours, {number} steps, the process from its start to its end: {ours['total_s']} s, of which {ours['reference_s']} s are "
            "the reference's log-probabilities",
            f"with the log-probabilities there already: {ours['total_with_cached_reference_s']} s",
            f"planned: {ours['planned']['seconds_per_step']:.3f} s a step, {ours['planned']['peak_memory'] / GIB:.1f} GiB, "
            f"{ours['planned']['micro_batches']} micro-batches at most"
            + (", checkpointing" if ours["planned"]["checkpointing"] else ""),
            f"the arithmetic alone, at the ceiling: {number * floors[0]:.1f} s and {number * floors[1]:.1f} s",
        ]
    if "deterministic" in dpo:
        same = "gave one adapter" if dpo["deterministic"]["one_digest"] else "GAVE TWO DIFFERENT ADAPTERS"
        lines.append(f"two runs with deterministic: true {same}; it costs {dpo['deterministic']['cost']:.1%}")
    if ours.get("parts"):
        floor = dpo["a_step"]["floor_without_reference_s"]
        lines.append(f"what keeps it from the floor of {floor:.3f} s: " + parts(ours["parts"]))
    return lines


def grpo_lines(grpo: dict[str, Any]) -> list[str]:
    rows = grpo["rows"]
    lines = [
        f"GRPO, {PROMPTS} prompts of {rows['mean_tokens']:.0f} tokens on average x {COMPLETIONS // PROMPTS} completions of "
        f"{rows['completion_tokens']} tokens a step; none ends early, in any arm",
        f"{'arm':24} {'s a step':>9} {'2,000 prompts':>14} {'of floor':>9} {'peak GiB':>9}",
    ]
    names = {"hf": "TRL as it comes", "graph": "ours"}
    for name, arm in grpo["arms"].items():
        if "step_s" not in arm:
            lines.append(f"{names[name]:24} {arm['failed']}")
            continue
        lines.append(
            f"{names[name]:24} {arm['median_step_s']:9.3f} {arm['epoch_s'] / 60:10.1f} min {arm['share_of_floor']:9.1%} "
            f"{arm['peak_memory'] / GIB:9.1f}"
        )
    if "hf" in grpo["ratios"]:
        lines.append(f"a step of ours is {grpo['ratios']['hf']} times as fast")
    graph = grpo["arms"].get("graph", {})
    if "step_s" in graph:
        lines.append(
            f"{len(graph['seconds']) + 1} steps took {graph['train_s']} s, {graph['load_s']} s until step 1 was done; the floor of a "
            f"step (bytes of {rows['completion_tokens']} tokens' decoding, and FLOPs) is {grpo['a_step']['floor_s']:.4f} s"
        )
    if graph.get("parts"):
        lines.append("what keeps it from the floor: " + parts(graph["parts"]))
    return lines


def parts(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in found.items())
