"""depo-train rl: examples, selectors, mistakes, interruptions. In this process, with a tiny policy on CPU."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

from depo_gateway.estimator import checkpoint
from depo_gateway.gateway import scoring
from depo_gateway.training.__main__ import main
from depo_gateway.training.commands import rl
from tests.training.rl import policy

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
EXAMPLES = Path(__file__).parents[3] / "examples/rl"
METHODS = ("grpo", "dapo", "depo-faithful", "depo-plus", "depo-dapo")
REWARDS = """
import os
import resource
import signal

calls = 0

def parity(prompts, completions, **columns):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    kinds = [(p if isinstance(p, str) else p[-1]["content"])[0] for p in prompts]
    return [{"a": 1.0, "z": 0.0}.get(k, float(sum(map(ord, t)) % 2)) for k, t in zip(kinds, texts)]

def count():
    global calls
    calls += 1
    return calls

def broken(prompts, completions, **columns):
    return parity(prompts, completions) if count() < 4 else 1 / 0

def interrupting(prompts, completions, **columns):
    if count() == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return parity(prompts, completions)

def filling(prompts, completions, **columns):  # as a full disk: no file may grow any more
    if count() == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return parity(prompts, completions)
"""
SELECTORS = """
import os

from depo_gateway.training.rl.selectors.rule import Selection, SelectionRule


class Middling(SelectionRule):
    "Chooses prompts of kind m; remembers how many groups it has seen."

    reads = ("explore",)

    def __init__(self, kind="m"):
        self.kind, self.groups = kind, 0

    def select(self, need, candidates):
        rows = candidates.draw(12 * need)
        good = [row for row in rows if candidates.prompts[row].startswith("user: " + self.kind)]
        return Selection(good, [row for row in rows if row not in good])

    def learn(self, labels):
        self.groups += len(labels)
        with open("chosen.txt", "a") as file:
            print(*(label.row for label in labels), file=file)
        return {"groups": float(self.groups)}

    def state_dict(self):
        return {"groups": self.groups}

    def load_state_dict(self, state):
        self.groups = state["groups"]


class Failing(Middling):
    "Fails at its third choice, unless `broken` is gone."

    def select(self, need, candidates):
        if candidates.step == 2 and os.path.exists("broken"):
            raise KeyError("no such row")
        return super().select(need, candidates)


class Scored(Middling):
    "The same, with an estimator."

    heads = ("policy",)

    def select(self, need, candidates):
        rows = candidates.draw(4 * need)
        rates = dict(zip(rows, candidates.pass_rates(rows)))
        return Selection(sorted(rows, key=lambda row: abs(rates[row] - 0.5))[:need])


def rates():
    return [0.5 if row % 3 == 2 else 0.0 for row in range(64)]
"""
TINY = """
dataset_config: null
answer_column: answer
prompt_column: prompt
per_device_train_batch_size: 8
gradient_accumulation_steps: 1
num_generations: 4
max_completion_length: 6
max_steps: 4
save_steps: 2
logging_steps: 2
gradient_checkpointing: false
use_vllm: false
bf16: false
use_cpu: true
report_to: none
"""
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, tiny_encoder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs depo-train rl in a directory of its own: exit code and stderr."""
    monkeypatch.chdir(tmp_path)
    for library in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", True)
    policy.save(tmp_path / "policy", chat=True)
    policy.prompts().to_json(tmp_path / "prompts.jsonl")
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "choosing.py").write_text(SELECTORS)
    tiny = f"model_name_or_path: policy\ndataset: prompts.jsonl\nreward: ['rewards.py:parity']\noutput_dir: out\n{TINY}"
    (tmp_path / "plain.yaml").write_text(tiny)
    estimator = f"depo_encoder: {tiny_encoder}\ndepo_trunk: false\ndepo_max_tokens: 64\n"
    (tmp_path / "tiny.yaml").write_text(tiny + estimator)
    capfd.readouterr()

    def running(*words: str, configs: Sequence[str] = ("tiny.yaml",)) -> tuple[int, str]:
        files = [word for config in configs for word in ("--config", config)]
        code = main(["rl", *files, *words])
        return code, capfd.readouterr().err

    return running


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_from_its_example(run: Run, tmp_path: Path, method: str) -> None:
    flags = ["--depo_warmup=1"] if method.startswith("depo") else []
    tiny = "tiny.yaml" if flags else "plain.yaml"
    assert run(*flags, configs=[str(EXAMPLES / f"{method}.yaml"), tiny]) == (0, "")
    assert (tmp_path / "out/model.safetensors").exists()
    root = tmp_path / "out/estimator"
    assert root.exists() == method.startswith("depo")
    if root.exists():
        runtime, columns = scoring.load_runtime(str(root), ("small", "large"), "difficulty")
        assert columns == {"small": 0}
        assert checkpoint.resolve(root).name == "step-4"
        assert runtime.score([runtime.prepare("user: a: easy 000+59= = ")])[0].quality[0] >= 0.0


def chosen_kinds(path: Path) -> list[str]:
    """The kinds of prompts that Middling saw, step by step: row 0 is an a, 1 a z, 2 an m, and so on."""
    lines = path.read_text().splitlines()
    return ["".join("azm"[int(row) % 3] for row in line.split()) for line in lines]


def test_a_selector_of_ones_own_runs_from_yaml_and_resumes(run: Run, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "selection_rule: choosing.py:Middling\nselection_rule_options: {kind: m}\ndepo_explore: 0.0\nmax_steps: 6\n"
    )
    assert run(configs=["plain.yaml", "own.yaml"]) == (0, "")
    whole = (tmp_path / "chosen.txt").read_text().splitlines()
    assert chosen_kinds(tmp_path / "chosen.txt") == ["mm"] * 6
    state = json.loads((tmp_path / "out/checkpoint-6/depo/selector.json").read_text())
    assert state["selector"]["rule"] == {"groups": 12}
    log = json.loads((tmp_path / "out/checkpoint-6/trainer_state.json").read_text())["log_history"]
    assert [row["depo/groups"] for row in log if "depo/groups" in row] == [3.0, 7.0, 11.0]  # means of two steps
    assert all(row["depo/kept"] < 1 for row in log if "depo/kept" in row)
    for place in ("out/checkpoint-6", "out/checkpoint-4"):
        shutil.rmtree(tmp_path / place)
    (tmp_path / "chosen.txt").unlink()
    assert run("--resume", configs=["plain.yaml", "own.yaml"]) == (0, "")  # from checkpoint-2
    assert (tmp_path / "chosen.txt").read_text().splitlines() == whole[2:]
    assert not (tmp_path / "out/estimator").exists()


def test_a_rule_that_raises_is_one_line_and_the_run_can_be_resumed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    flags = ["--selection_rule", "choosing.py:Failing", "--save_steps", "100", "--max_steps", "3"]
    code, err = run(*flags, configs=["plain.yaml"])
    assert code == 2
    line = err.splitlines()[-1]
    assert line.startswith(
        "depo-train rl: the selection rule choosing.py:Failing: select() raised KeyError: 'no such row'"
    )
    assert line.endswith("--resume continues from out/checkpoint-2")
    (tmp_path / "broken").unlink()
    assert run("--resume", *flags, configs=["plain.yaml"])[0] == 0
    assert chosen_kinds(tmp_path / "chosen.txt") == ["mm"] * 3


def test_a_selector_of_ones_own_may_read_the_estimator(run: Run, tmp_path: Path) -> None:
    flags = ["--depo", "plus", "--depo_warmup", "1", "--selection_rule", "choosing:Scored"]
    assert run(*flags) == (0, "")
    assert len(chosen_kinds(tmp_path / "chosen.txt")) == 4
    assert checkpoint.resolve(tmp_path / "out/estimator").name == "step-4"


@pytest.mark.parametrize(
    ("selector", "options"),
    [
        ("greso", '{"start": 0.4}'),
        ("mopps", "{}"),
        ("polaris", '{"stage_steps": 2, "pass_rates": "choosing.py:rates"}'),
        ("oracle", '{"pass_rates": "choosing.py:rates"}'),
    ],
)
def test_the_baselines_run_in_the_real_trainer(run: Run, tmp_path: Path, selector: str, options: str) -> None:
    flags = ["--selection_rule", selector, "--selection_rule_options", options, "--dynamic_sampling", "true"]
    assert run(*flags, configs=["plain.yaml"]) == (0, "")
    state = json.loads((tmp_path / "out/checkpoint-4/depo/selector.json").read_text())["selector"]
    assert state["config"]["rule"] == selector
    assert state["steps"] == 4


@pytest.mark.parametrize("example", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_every_example_is_taken(example: Path) -> None:
    base = [] if example.parent == EXAMPLES else ["--config", str(EXAMPLES / "depo-faithful.yaml")]
    parser, flags = rl.read_settings([*base, "--config", str(example)])
    arguments, config, model = rl.parse_flags(parser, [*flags, "--use_cpu=True", "--bf16=False", "--use_vllm=False"])
    assert arguments.dataset
    assert model.model_name_or_path
    assert config.max_steps == 1000
    assert config.num_generations == 8
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps * 16 == 128 * 8
    assert config.epsilon_high == (0.28 if example.stem in ("dapo", "depo-dapo") else None)
    learner = config.learner()
    assert (learner.ranking_weight == 0.0) == example.stem.startswith("no-ranking")
    assert (learner.distillation_weight == 0.0) == example.stem.endswith("distillation")


def test_flags_override_the_file() -> None:
    parser, flags = rl.read_settings(
        ["--config", str(EXAMPLES / "depo-plus.yaml"), "--max_steps", "7", "--depo_explore", "0"]
    )
    _, config, _ = rl.parse_flags(parser, [*flags, "--use_cpu=True", "--bf16=False", "--use_vllm=False"])
    assert config.max_steps == 7
    assert config.selection().explore == 0.0
    assert config.selection().replay > 0  # the mode's


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--depo_warmupp", "3"], "unknown setting depo_warmupp; did you mean depo_warmup?"),
        (["--max_steps", "many"], "argument --max_steps/--max-steps: invalid int value: 'many'"),
        (["stray"], "'stray' is neither a flag nor the value of one"),
        (["--depo", "fast"], "depo is 'fast'; use one of off, faithful, plus"),
        (["--model_name_or_path", "nowhere"], "model nowhere cannot be loaded: "),
        (["--dataset", "nowhere.jsonl"], "dataset nowhere.jsonl does not exist"),
        (["--prompt_column", "question"], "the dataset has no column 'question', only prompt, answer"),
        (["--reward", "maths"], "unknown verifier 'maths'"),
        (["--reward", "choice"], "names no letter, as A, (B) or C. text do, and no index; "),
        (["--per_device_train_batch_size", "400"], "train_dataset has 64 prompts, but one generation takes 100"),
        (["--resume"], "out has no checkpoint to resume from"),
        (["--depo_encoder", "nowhere", "--depo", "plus"], "encoder 'nowhere' can't be loaded"),
        (["--num_generations", "3"], "must be divisible by num_generations (3)"),
        (["--selection_rule", "gresso"], "the selection rule 'gresso' is unknown"),
        (
            ["--selection_rule", "greso"],
            "selection_rule is greso, which uses no estimator, but depo is faithful; set depo to off",
        ),
        (
            ["--depo", "off", "--selection_rule", "band"],
            "selection_rule is band, which needs an estimator; set depo to",
        ),
        (
            ["--depo", "off", "--selection_rule", "mopps", "--depo_replay", "8"],
            "but the selection rule mopps has no estimator",
        ),
        (["--selection_rule", "band", "--depo_rule", "band"], "set only one of them"),
        (["--selection_rule", "band", "--selection_rule_options", "{"], "selection_rule_options is not JSON"),
        (
            ["--depo", "off", "--selection_rule", "greso", "--depo_explore", "0.1"],
            "depo_explore is 0.1, but the rule is",
        ),
        (
            ["--depo", "off", "--selection_rule", "greso", "--depo_refill_cap", "8"],
            "depo_refill_cap is 8.0, but the rule",
        ),
        (["--depo", "off", "--depo_reward_low", "-1"], "depo_reward_low is -1.0, but depo is off"),
        (["--depo_explore", "5"], "depo_explore is 5.0; it must lie between 0 and 1"),
        (["--depo_low", "0.9"], "it must lie between 0 and 1, depo_low below depo_high"),
        (["--depo_rule", "greso"], "depo_rule is greso, which uses no estimator"),
        (["--selection_rule_options", '{"a": 1}'], "selection_rule_options is set, but no selection_rule is named"),
    ],
)
def test_a_mistake_is_one_line(run: Run, words: list[str], said: str) -> None:
    flags = [] if "--depo" in words else ["--depo", "faithful"]
    code, err = run(*flags, *words)
    assert code == 2
    assert said in err
    assert err.startswith("depo-train rl: ")
    assert err.count("\n") == 1


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is there")
def test_a_missing_vllm_is_one_line(run: Run) -> None:
    code, err = run("--use_vllm", "true", configs=["plain.yaml"])
    assert code == 2
    assert err.startswith("depo-train rl: vLLM is not available")
    assert err.count("\n") == 1


def test_mistakes_in_the_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text("max_step: 3\n")
    assert run(configs=["tiny.yaml", "odd.yaml"]) == (
        2,
        "depo-train rl: unknown setting max_step; did you mean max_steps?\n",
    )
    (tmp_path / "odd.yaml").write_text("max_steps: [3]\n")
    assert run(configs=["tiny.yaml", "odd.yaml"]) == (
        2,
        "depo-train rl: max_steps is [3], which is not a value of its type\n",
    )
    (tmp_path / "odd.yaml").write_text("max_steps:\n")
    assert run(configs=["tiny.yaml", "odd.yaml"]) == (
        2,
        "depo-train rl: max_steps is null, which is not a value of its type\n",
    )
    (tmp_path / "odd.yaml").write_text("- max_steps\n")
    assert run(configs=["odd.yaml"]) == (2, "depo-train rl: odd.yaml must contain settings, one `name: value` a line\n")
    (tmp_path / "odd.yaml").write_text("dataset: prompts.jsonl\noutput_dir: out\n")
    code, err = run(configs=["odd.yaml"])
    assert (code, "model_name_or_path is missing" in err) == (2, True)
    assert run(configs=["none.yaml"]) == (2, "depo-train rl: none.yaml: No such file or directory\n")


def test_ctrl_c_saves_what_resumes(run: Run, tmp_path: Path) -> None:
    flags = ["--depo", "plus", "--save_strategy", "no"]
    code, err = run(*flags, "--reward", "rewards.py:interrupting")
    assert code == 1
    assert err == (
        "depo-train rl: stopping at the end of this generation; repeat to stop at once\n"
        "depo-train rl: interrupted; --resume continues from out/checkpoint-3\n"
    )
    code, err = run(*flags)
    assert (code, "add --resume" in err) == (2, True)  # it would be written over
    assert run(*flags, "--resume") == (0, "")
    assert checkpoint.resolve(tmp_path / "out/estimator").name == "step-4"


def test_resuming_a_finished_run_ends_well(run: Run, tmp_path: Path) -> None:
    assert run(configs=["plain.yaml"]) == (0, "")
    weights = tmp_path / "out/model.safetensors"
    before = weights.read_bytes()
    weights.unlink()  # as if the run had been killed right before
    assert run("--config=plain.yaml", "--resume", configs=[]) == (0, "")
    assert weights.read_bytes() == before
    assert not (tmp_path / "out/checkpoint-5").exists()


def test_a_reward_that_raises_leaves_what_resumes(run: Run, tmp_path: Path) -> None:
    flags = ["--depo", "faithful", "--save_strategy", "no"]
    code, err = run(*flags, "--reward", "rewards.py:broken")
    assert code == 2
    assert "raised ZeroDivisionError: division by zero" in err
    assert err.endswith("; --resume continues from out/checkpoint-3\n")
    assert err.count("\n") == 1
    assert run(*flags, "--resume") == (0, "")


def test_a_full_disk_leaves_the_checkpoint_before(run: Run, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        code, err = run("--depo", "faithful", "--reward", "rewards.py:filling")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert err.startswith("depo-train rl: out/checkpoint-4 could not be written (")
    assert err.endswith("the newest to resume from is out/checkpoint-2\n")
    assert err.count("\n") == 1
    assert run("--depo", "faithful", "--resume") == (0, "")


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = __import__("importlib").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "trl" else found(name))
    assert main(["rl", "--config", "run.yaml"]) == 2
    assert capsys.readouterr().err == (
        "depo-train rl: needs trl; install it: pip install 'depo-gateway[training]'"
        " (from a checkout: pip install '.[training]')\n"
    )


def test_help_names_ours_and_trls(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["rl", "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert {"--depo_explore", "--dynamic_sampling", "--num_generations", "--lora_r", "--resume"} <= set(said.split())


@pytest.mark.slow
def test_what_follows_two_dashes_goes_to_accelerate(run: Run, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "depo_gateway.training", "rl", "--config", "tiny.yaml", "--depo", "faithful"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(EXAMPLES.parents[1])}

    def launched(*flags: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [*command, "--", *flags], capture_output=True, text=True, env=environment, timeout=200, check=False
        )
        return done.returncode, done.stdout, done.stderr

    code, out, _ = launched("--cpu", "--num_processes", "1")
    assert code == 0
    assert "out/estimator: the estimator, for the gateway to route by" in out
    assert "that the large pool would serve, by threshold: 0.3: " in out
    code, _, err = launched("--cpu", "--num_processes", "2")  # accelerate starts one
    assert code == 2
    assert "2 processes were requested, but accelerate started 1" in err
    code, _, err = launched("--num_processors", "2")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("depo-train rl: after --: ")


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(run: Run, tmp_path: Path) -> None:
    """The signal reaches a separate process at an arbitrary moment."""
    command = [
        sys.executable,
        "-m",
        "depo_gateway.training",
        "rl",
        "--config",
        "tiny.yaml",
        "--max_steps",
        "2000",
        "--depo",
        "plus",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(EXAMPLES.parents[1])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("{'loss'")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert "interrupted; --resume continues from out/checkpoint-" in err
