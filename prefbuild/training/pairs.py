"""TRL's experimental trainers of pairs, ORPO and CPO, on rows that `prepare` rendered, tokenised, cut and counted.

Both are of one make (TRL 1.16): they render and tokenise in their constructor, cut answers to max_length, add an
end-of-sequence token where the answer has another end of turn, and count no tokens.
"""

import os
from typing import Any

from prefbuild.training import ranks

# TRL warns that they may go away in a later version; which version is used is pinned.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

IGNORED = -100  # a label that is in no loss


class PreparedPairs:
    """Mixed into ORPOTrainer and CPOTrainer: takes prepared token ids as they are, and counts tokens."""

    _total_train_tokens = 0  # named as in TRL's other trainers

    def tokenize_row(self, feature: dict[str, list[int]], model: Any = None) -> dict[str, list[int]]:
        """A prepared row in the columns that their collator pads."""
        prompt = feature["prompt_ids"]
        columns = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for answer in ("chosen", "rejected"):
            ids = feature[f"{answer}_ids"]
            columns[f"{answer}_input_ids"] = prompt + ids
            columns[f"{answer}_attention_mask"] = [1] * (len(prompt) + len(ids))
            columns[f"{answer}_labels"] = [IGNORED] * len(prompt) + ids
        return columns

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        """TRL's loss, counting the tokens it is computed on."""
        self._total_train_tokens += ranks.total(
            int(inputs["chosen_attention_mask"].sum() + inputs["rejected_attention_mask"].sum())
        )
        return super().compute_loss(model, inputs, *arguments, **named)  # type: ignore[misc]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's metrics and num_tokens, as its other trainers do."""
        if "loss" in logs:
            logs["num_tokens"] = float(self._total_train_tokens)
        super().log(logs, start_time)  # type: ignore[misc]
