"""Evaluation during a run: tasks of `serve.evaluation` on the model that is trained."""
