"""Evaluation of models: tasks of lm-eval, and retrieval from long texts.

`stu-eval` runs tasks on a model directory, and `stu-train` on the model that it trains: this folder
is the only one of `serve` that `train` imports.
"""
