import sys
from pathlib import Path

import pytest

from depo_gateway.training.rewards.import_path import absolute_import_path, import_callable

PLAYED = "def play(completion, reference): return float(reference)"


def test_it_finds_files_and_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "played.py").write_text(PLAYED)
    assert import_callable(f"{tmp_path}/played.py:play")("", "2") == 2
    assert import_callable("depo_gateway.training.rewards.exact:grade_exact").__name__ == "grade_exact"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "beside_it.py").write_text("import played\nplay = played.play")
    assert import_callable("beside_it:play")("", "2") == 2
    assert import_callable("played.py:play")("", "2") == 2


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("math_verify", "'math_verify' is not an import path: write module:function or path/to/file.py:function"),
        (":f", "':f' is not an import path"),
        ("no_such_module:f", "cannot import no_such_module for .*: ModuleNotFoundError: No module named"),
        ("no/such.py:f", "cannot import no/such.py for .*: FileNotFoundError"),
        ("depo_gateway.training.rewards.verifiers:nothing", "depo_gateway.training.rewards.verifiers has no 'nothing'"),
        (
            "depo_gateway.training.rewards.verifiers:MATH",
            "'depo_gateway.training.rewards.verifiers:MATH' is not callable",
        ),
    ],
)
def test_a_path_that_leads_nowhere_is_one_sentence(path: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        import_callable(path)
    assert "\n" not in str(caught.value)


def test_a_module_that_raises_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("def f(:")
    (tmp_path / "fails.py").write_text("1 / 0")
    with pytest.raises(ValueError, match=r"cannot import .*: SyntaxError: invalid syntax"):
        import_callable(f"{tmp_path}/wrong.py:f")
    with pytest.raises(ValueError, match=r"cannot import .*: ZeroDivisionError: division by zero"):
        import_callable(f"{tmp_path}/fails.py:f")


def test_an_absolute_import_path_still_resolves_after_a_chdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_import_path("own.py:play") == f"{tmp_path}/own.py:play"
    assert absolute_import_path("own:play") == "own:play"
