"""The pipeline on one screen: a module a stage, each with `run(settings, inputs, outputs, work, name)`.

model, data -> prepare -> (reference ->) train -> merge -> evaluate -> gate -> report
model -> baseline -------------------------------------------------^
"""

STAGES = {
    "model": "prefbuild.stages.model",  # a source becomes a checkpoint folder
    "data": "prefbuild.stages.data",  # a source becomes files of rows
    "prepare": "prefbuild.stages.prepare",  # rows become prompt, chosen, rejected
    "reference": "prefbuild.stages.reference",  # what the reference says to them, for DPO's packed engine
    "train": "prefbuild.stages.train",  # an adapter, or all weights
    "merge": "prefbuild.stages.merge",  # it and the base become one model, and prove it
    "evaluate": "prefbuild.stages.evaluate",  # lm-evaluation-harness on the merged model
    "baseline": "prefbuild.stages.baseline",  # the same on the base
    "gate": "prefbuild.stages.gate",  # a verdict
    "report": "prefbuild.stages.report",  # pages and pictures
}
