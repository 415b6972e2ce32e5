"""Small real parts that many tests share: a two-layer BERT, and checkpoints that tell easy prompts from hard ones."""

import random
import re
from pathlib import Path

import pytest

from tests.postgres import postgres, postgres_server, records_url
from tests.stored import stored

__all__ = ["postgres", "postgres_server", "records_url"]  # fixtures

WORDS = re.findall(
    r"\w+",
    "easy hard small large what is the sum of one two three prove theorem hello thanks again "
    "please why how question about user assistant model answer number",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: else one of two processes (`make test`) ends with them while the other waits."""
    items.sort(key=lambda item: (item.path.name != "test_images.py", "training" not in item.path.parts))


@pytest.fixture(scope="session")
@stored
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random two-layer BERT and a word-level WordPiece tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *WORDS,
        *letters,
        *(f"##{letter}" for letter in letters if letter.isalnum()),
    ]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # type: ignore[call-arg]
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    place = tmp_path_factory.mktemp("encoder")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(place)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(place)
    return place


@pytest.fixture(scope="session")
@stored
def tiny_checkpoint(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint of the pools small and large: prompts with the word "hard" need the large one."""
    import torch

    from depo_gateway.estimator import export
    from depo_gateway.estimator.calibration import Calibration
    from depo_gateway.estimator.learner import Learner, LearnerConfig
    from depo_gateway.estimator.model import ModelConfig, create_model
    from depo_gateway.estimator.records.types import Example
    from depo_gateway.estimator.text import TextConfig
    from tests.stages import uncalibrated_stage

    torch.manual_seed(0)
    chance = random.Random(0)
    examples = []
    for index in range(400):
        hard = index % 2 == 1
        words = [chance.choice(WORDS[2:]) for _ in range(chance.randint(2, 9))]
        words.insert(chance.randrange(len(words) + 1), "hard" if hard else "easy")
        examples.append(Example(" ".join(words), {"small": 0.0 if hard else 1.0, "large": 1.0}))
    model, tokenizer = create_model(ModelConfig(("small", "large"), TextConfig(), str(tiny_encoder), 0))
    learner = Learner(model, tokenizer, LearnerConfig())
    items = learner.items(examples)
    learner.fit_statistics(items)
    for _ in range(15):
        for start in range(0, len(items), 50):
            learner.step_items(items[start : start + 50])
    straight = uncalibrated_stage(2)
    place = tmp_path_factory.mktemp("checkpoints") / "tiny"
    export.export_checkpoint(
        place, model, tokenizer, Calibration(("small", "large"), {"full": straight, "cheap": straight}, {}), {}
    )
    return place


POLICY_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}"
    "{% endif %}{{ message.role }} {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="session")
@stored
def tiny_policy_checkpoint(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint as depo-train rl leaves it: one pool, the policy's chat template, DEPO's trunk, no wide part.

    A conversation with the word "hard" anywhere, in its system message too, is hard for the policy.
    """
    import numpy as np
    import torch

    from depo_gateway.estimator import calibration, export
    from depo_gateway.estimator.calibration import Calibration
    from depo_gateway.estimator.learner import Learner, LearnerConfig
    from depo_gateway.estimator.logistic import sigmoid
    from depo_gateway.estimator.model import ModelConfig, create_model
    from depo_gateway.estimator.records.types import Example
    from depo_gateway.estimator.text import CHAT, TextConfig, extract_text, with_special_tokens
    from tests.stages import uncalibrated_stage

    torch.manual_seed(0)
    chance = random.Random(0)
    chat = with_special_tokens(POLICY_CHAT, {"bos_token": "<s>", "eos_token": "</s>"})
    text = TextConfig(CHAT, "cls", 64, chat)
    examples = []
    for index in range(300):
        hard = index % 2 == 1
        turns = [[chance.choice(WORDS[2:]) for _ in range(chance.randint(2, 6))] for _ in range(2)]
        turn = chance.choice(turns)
        turn.insert(chance.randrange(len(turn) + 1), "hard" if hard else "easy")
        messages = [
            {"role": role, "content": " ".join(words)} for role, words in zip(("system", "user"), turns, strict=True)
        ]
        prompt, _ = extract_text(text, messages[chance.randrange(2) if turn is turns[1] else 0 :])
        examples.append(Example(prompt, {"policy": 0.0 if hard else 1.0}))
    model, tokenizer = create_model(
        ModelConfig(("policy",), text, str(tiny_encoder), 0, wide=False, trunk=True), rounded=False
    )
    learner = Learner(model, tokenizer, LearnerConfig(train_layers=-1, encoder_learning_rate=2e-3, average=0.0))
    items = learner.items(examples)
    learner.fit_statistics(items)
    for _ in range(8):
        for start in range(0, len(items), 50):
            learner.step_items(items[start : start + 50])
    full, _ = learner.predict(items)
    quality = sigmoid(full[:, :, 0])
    observed = np.array([[example.quality["policy"]] for example in examples])
    straight = uncalibrated_stage(1)
    curves = {"difficulty": calibration.measure_curve(quality, observed, np.ones(len(examples)), "difficulty")}
    place = tmp_path_factory.mktemp("checkpoints") / "policy"
    export.export_checkpoint(
        place, model, tokenizer, Calibration(("policy",), {"full": straight, "cheap": straight}, curves), {}
    )
    return place
