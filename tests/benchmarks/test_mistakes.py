"""What is wrong on the command line of a benchmark is one line."""

import sys
from collections.abc import Callable

import pytest

from benchmarks import codec, memory, sample


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (memory.main, ["model=nope"], "model=nope is unknown"),
        (memory.main, ["model.num_scales=0"], "num_scales"),
        (sample.main, ["experiment=mnist", "--device", "cuda:7"], "--device cuda:7: "),
        (codec.main, ["nope.ckpt"], "no checkpoint at nope.ckpt"),
    ],
)
def test_mistakes_are_one_line(
    main: Callable[[], None],
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
