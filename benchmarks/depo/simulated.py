"""DEPO and the other prompt selectors where difficulty must be read from words: a policy simulated from real outcomes.

`python -m benchmarks.depo.simulated --data DIR --out DIR`
"""
