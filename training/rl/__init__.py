"""Policy optimisation with GRPO, DAPO and DEPO, and the selection of prompts before the rollout."""
