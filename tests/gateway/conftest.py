"""A running gateway in front of scripted backends."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import fastapi.dependencies.models
import pytest
from prometheus_client.parser import text_string_to_metric_families

from depo_gateway.gateway import config, server
from depo_gateway.gateway.openai.apis import APIS, Apis
from tests.gateway.backend import FakeVllm
from tests.stored import stored


@dataclass
class Running:
    """A gateway that serves; `url` and `admin` are its two addresses."""

    url: str
    admin: str
    stop: asyncio.Event
    session: aiohttp.ClientSession

    async def chat(self, text: str = "easy", model: str = "auto", **fields: Any) -> aiohttp.ClientResponse:
        body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
        return await self.session.post(f"{self.url}/v1/chat/completions", json=body)

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples whose labels contain `labels`; 0 if there is none."""
        async with self.session.get(f"{self.admin}/metrics") as answer:
            families = text_string_to_metric_families(await answer.text())
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    async def settles(self, name: str, value: float, seconds: float = 3.0, **labels: str) -> bool:
        """Whether a metric reaches a value in time."""
        for _ in range(int(seconds / 0.02)):
            if await self.metric(name, **labels) == value:
                return True
            await asyncio.sleep(0.02)
        return False


def settings(small: list[FakeVllm], large: list[FakeVllm], checkpoint: Path, /, **sections: Any) -> dict[str, Any]:
    """The plain values of a gateway.yaml; `sections` adds whole sections, and to the pools `small` and `large`."""
    pools = {
        "small": {"model": "org/small-1b", "cost": 1, "backends": [{"url": item.url} for item in small]},
        "large": {"model": "org/large-9b", "cost": 5, "backends": [{"url": item.url + "/v1"} for item in large]},
    }
    for name in pools:
        pools[name] |= sections.pop(name, {})
    return {
        "version": 1,
        "listen": {"port": 0},
        "admin": {"port": 0},
        "pools": pools,
        "routing": {"expose_scores": True, **sections.pop("routing", {})},
        "estimator": {"path": str(checkpoint), "deadline_ms": 2000},
        **sections,
    }


@contextlib.asynccontextmanager
async def running(raw: dict[str, Any], path: Path | None = None, apis: Apis = APIS) -> AsyncIterator[Running]:
    """Serves a config in this process, over real sockets."""
    addresses: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    task = asyncio.create_task(
        server.serve(config.parse_config(raw), path, lambda *both: addresses.set_result(both), stop, apis)
    )  # fmt: skip
    await asyncio.wait((task, addresses), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    async with aiohttp.ClientSession() as session:
        url, admin = await addresses
        try:
            yield Running(url, admin, stop, session)
        finally:
            stop.set()
            await task
            forget_routes()


@pytest.fixture(scope="module", autouse=True)
def collected() -> Iterator[None]:
    """What a module's gateways leave is reference cycles that hold memory outside Python's count."""
    yield
    gc.collect()


def forget_routes() -> None:
    """Empties FastAPI's caches, which hold the routes of past gateways and so their estimators, up to 800 MB each."""
    for cached in vars(fastapi.dependencies.models).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


StartGateway = Callable[..., contextlib.AbstractAsyncContextManager[Running]]


@pytest.fixture
def start(tiny_checkpoint: Path) -> StartGateway:
    """`async with start([small], [large], routing={...}) as gateway`."""

    def begin(small: list[FakeVllm], large: list[FakeVllm], /, **sections: Any) -> Any:
        return running(settings(small, large, tiny_checkpoint, **sections))

    return begin


@pytest.fixture(scope="session")
@stored
def slow_checkpoint(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint that takes its time: thousands of tokens through full attention."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from depo_gateway.estimator import export
    from depo_gateway.estimator.calibration import Calibration
    from depo_gateway.estimator.learner import Learner, LearnerConfig
    from depo_gateway.estimator.model import ModelConfig, create_model
    from depo_gateway.estimator.records.types import Example
    from depo_gateway.estimator.text import TextConfig
    from tests.stages import uncalibrated_stage

    encoder = tmp_path_factory.mktemp("slow") / "encoder"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_encoder)
    tokenizer.save_pretrained(encoder)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **shape)
    BertModel(config, add_pooling_layer=False).save_pretrained(encoder)
    model, fast = create_model(ModelConfig(("small", "large"), TextConfig(max_tokens=2048), str(encoder), 0))
    learner = Learner(model, fast, LearnerConfig())
    learner.fit_statistics(learner.items([Example("easy one", {"small": 1.0, "large": 1.0})]))
    straight = uncalibrated_stage(2)
    place = tmp_path_factory.mktemp("checkpoints") / "slow"
    export.export_checkpoint(
        place, model, fast, Calibration(("small", "large"), {"full": straight, "cheap": straight}, {}), {}
    )
    return place
