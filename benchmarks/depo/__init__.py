"""DEPO against GRPO, DAPO and other ways to choose prompts, on a task and a policy small enough for a laptop.

`make bench-depo`, or `python -m benchmarks.depo.run` and then `python -m benchmarks.depo.report`.
"""
