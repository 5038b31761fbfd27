"""Scores of a configuration's systems, by lm-evaluation-harness.

`systems` says what is compared, `tasks` on what, `lm` is an engine as the harness's model, `tuned`
the directly tuned model, `run` has all of them answer, `scores` sets the scores side by side.
"""
