"""DEPO Gateway: routing by a learned difficulty estimator (gateway), the estimator, and its training.

The names below are the public API. Each is imported when it is first used: importing this package loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from depo_gateway.estimator.records.types import Example as Example
    from depo_gateway.estimator.records.types import Record as Record
    from depo_gateway.estimator.runtime import Runtime as Runtime
    from depo_gateway.training.rewards.reward_functions import reward_function as reward_function
    from depo_gateway.training.rl.config import DepoConfig as DepoConfig
    from depo_gateway.training.rl.tickets import PromptSelector as PromptSelector
    from depo_gateway.training.rl.tickets import Ticket as Ticket
    from depo_gateway.training.rl.trainer import DepoTrainer as DepoTrainer

_MODULES = {
    "DepoConfig": "depo_gateway.training.rl.config",
    "DepoTrainer": "depo_gateway.training.rl.trainer",
    "Example": "depo_gateway.estimator.records.types",
    "PromptSelector": "depo_gateway.training.rl.tickets",
    "Record": "depo_gateway.estimator.records.types",
    "Runtime": "depo_gateway.estimator.runtime",
    "Ticket": "depo_gateway.training.rl.tickets",
    "reward_function": "depo_gateway.training.rewards.reward_functions",
}

__all__ = [
    "DepoConfig",
    "DepoTrainer",
    "Example",
    "PromptSelector",
    "Record",
    "Runtime",
    "Ticket",
    "__version__",
    "reward_function",
]


if not TYPE_CHECKING:  # a type checker that saw it would accept every name

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
