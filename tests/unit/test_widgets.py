"""The live view as text and as widgets, and the sample tables."""

from __future__ import annotations

from itertools import count
from typing import Any

import matplotlib as mpl
import pandas as pd
import pytest
import torch
from IPython.display import HTML

from utils.data.pairs import Prompt
from utils.plots import widgets
from utils.reinforce.sampling import Rollout

mpl.use("Agg")

PROMPTS = [
    Prompt(f"p{i}", "train", "advice", ({"role": "user", "content": f"Is {i} <b>big</b>?"},))
    for i in range(4)
]
ROLLOUT = Rollout([[1]] * 4, [[2, 3]] * 4, [True] * 4, ["yes & <i>no</i>", "b", "c", "d"])
REWARDS = torch.tensor([0.5, -0.25, 0.0, 1.0])


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is 5 s after the last one."""
    ticks = count(100, 5)
    monkeypatch.setattr(widgets.time, "monotonic", lambda: float(next(ticks)))


def row(step: int) -> dict[str, Any]:
    return {
        **{"step": step, "reward": 0.123, "baseline": 0.031, "kl": 0.212, "seconds": 3.0},
        **{"completions/mean_length": 70.4, "completions/clipped_ratio": 0.5, "eval_reward": None},
    }


def samples() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "prompt_id": ["p1", "p2"],
            "category": ["advice", "explain"],
            "prompt": ["Why <script>?", "How?"],
            "response [sft]": ["a\nb", "c"],
            "reward [sft]": [0.123456, -1.0],
            "response [align_scalar]": ["<td>", "d"],
            "reward [align_scalar]": [1.0, 2.0],
            "length [align_scalar]": [12, 7],
        }
    )


def test_tests_are_not_live():
    assert not widgets.is_live()


@pytest.mark.parametrize(("setting", "live"), [(None, True), ("1", True), ("0", False)])
def test_a_notebook_is_live_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, setting: str | None, live: bool
):
    shell = type("Shell", (type("ZMQInteractiveShell", (), {}),), {})
    monkeypatch.setattr(widgets, "get_ipython", lambda: shell())
    monkeypatch.delenv("REPORT_WIDGETS", raising=False)
    if setting is not None:
        monkeypatch.setenv("REPORT_WIDGETS", setting)
    assert widgets.is_live() == live


def test_text_view_prints_one_line_per_step(capsys: pytest.CaptureFixture[str]):
    view = widgets.LiveView("demo", 24)
    view(row(2), PROMPTS, ROLLOUT, REWARDS)
    view(row(3), PROMPTS, ROLLOUT, REWARDS)
    assert capsys.readouterr().out.splitlines() == [
        "[demo] step 2/24 reward +0.12 (baseline +0.03) kl 0.21 length 70 finished 0.50, "
        "about 66 s left",  # the first step took its own 3 s: 22 steps are left
        "[demo] step 3/24 reward +0.12 (baseline +0.03) kl 0.21 length 70 finished 0.50, "
        "about 84 s left",  # the second one 5 s by the clock: 21 steps at 4 s
    ]
    assert view.box is None


def test_text_view_shows_a_sample_every_eighth_step(capsys: pytest.CaptureFixture[str]):
    widgets.LiveView("demo", 24)(row(8), PROMPTS, ROLLOUT, REWARDS)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "    prompt: Is 0 <b>big</b>?",
        "    response (reward +0.50): yes & <i>no</i>",
    ]


def test_live_view_updates_its_widgets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shown: list[Any] = []
    monkeypatch.setattr(widgets, "is_live", lambda: True)
    monkeypatch.setattr(widgets, "display", shown.append)
    view = widgets.LiveView("demo", 24)
    for step in (1, 2, 3):
        view(row(step), PROMPTS, ROLLOUT, REWARDS)
    assert shown == [view.box]
    assert capsys.readouterr().out == ""
    progress, label, image, table = view.box.children
    assert (progress.value, progress.max) == (3, 24)
    assert label.value.startswith("[demo] step 3/24")
    assert bytes(image.value).startswith(b"\x89PNG")
    assert table.value.count("<tr>") == 4
    assert "yes &amp; &lt;i&gt;no&lt;/i&gt;" in table.value
    assert "Is 0 &lt;b&gt;big" in table.value
    assert "<i>" not in table.value


def test_long_texts_are_cut():
    assert widgets.shorten("a\n\n b") == "a b"
    assert widgets.shorten("x" * 160) == "x" * 160
    assert widgets.shorten("x" * 161) == "x" * 159 + "…"


def test_the_table_escapes_texts_and_keeps_line_breaks():
    table = widgets.html_table(["a<b"], [["<img src=x>\n\"q\" & 'r'"]])
    assert "a&lt;b</th>" in table
    assert ">&lt;img src=x&gt;<br>&quot;q&quot; &amp; &#x27;r&#x27;</td>" in table


def test_browsing_without_widgets_gives_a_table():
    view = widgets.browse_samples(samples())
    assert isinstance(view, HTML)
    assert view.data.count("<tr>") == 3
    assert ">(reward 0.1235)<br>a<br>b</td>" in view.data
    assert ">(reward 1, length 12)<br>&lt;td&gt;</td>" in view.data
    assert "<script>" not in view.data


def test_browsing_with_widgets_shows_one_prompt(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(widgets, "is_live", lambda: True)
    category, prompt, view = widgets.browse_samples(samples()).children
    assert "Why" in view.value
    prompt.value = 2
    assert "How?" in view.value
    category.value = "advice"
    assert "Why" in view.value
    assert (prompt.value, prompt.max) == (1, 1)
