"""GRPO, DAPO and DEPO through the real TRL trainer, at a policy of your choice: seconds as well as completions.

`python -m benchmarks.depo_trl --policy smollm2 --out runs/depo_trl` on a GPU; `--policy chains` runs anywhere.
"""
