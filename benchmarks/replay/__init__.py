"""The online loop, replayed: an outcome table streams as traffic through a running gateway with a learner beside it.
`python -m benchmarks.replay`.
"""
