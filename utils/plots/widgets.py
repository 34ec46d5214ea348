"""Watch a run and browse samples: widgets in a live notebook, plain text and tables elsewhere."""

from __future__ import annotations

import html
import importlib.util
import io
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from IPython import get_ipython
from IPython.display import HTML, display
from matplotlib.figure import Figure
from torch import Tensor

from utils.plots.style import BLUE, DARK, GREY, measured, smooth, style

SHORT = 160  # characters of a text that is shown in a line
SAMPLE_EVERY = 8  # steps between two samples in the text view
REFRESHES = 12  # of the live figure and its samples, over a run


def is_live() -> bool:
    """Return whether widgets can be shown: in a notebook, unless REPORT_WIDGETS is 0."""
    if os.environ.get("REPORT_WIDGETS") == "0" or not importlib.util.find_spec("ipywidgets"):
        return False
    shells = [kind.__name__ for kind in type(get_ipython()).__mro__]
    return "ZMQInteractiveShell" in shells  # Colab's shell is derived from it


def shorten(text: str, limit: int = SHORT) -> str:
    """Return a text in one line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def html_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return an HTML table whose cells wrap; all texts are escaped, line breaks are kept.

    Alignment is given as attributes too, since GitHub drops styles.
    """
    wrap = 'align="left" valign="top" style="text-align: left; white-space: normal"'
    lines = ["<table>", "<tr>", *(f"<th {wrap}>{_escaped(name)}</th>" for name in header), "</tr>"]
    for row in rows:
        lines += ["<tr>", *(f"<td {wrap}>{_escaped(cell)}</td>" for cell in row), "</tr>"]
    return "\n".join([*lines, "</table>"])


class LiveView:
    """The monitor of `train_policy`: progress, curves and samples while a policy is aligned.

    Attributes:
        title: of the run.
        steps: how many there will be.
        box: the widgets, from the first step on; None in the text view.
    """

    def __init__(self, title: str, steps: int) -> None:
        self.title, self.steps = title, steps
        self.box: Any = None
        self._rows: list[dict[str, Any]] = []
        self._taken: list[float] = []
        self._last = 0.0

    def __call__(
        self, row: dict[str, Any], prompts: Sequence[Any], rollout: Any, rewards: Tensor
    ) -> None:
        """Show one step: its metrics row, prompts, completions and rewards, shape (rows,)."""
        now = time.monotonic()
        self._taken.append(now - self._last if self._taken else row["seconds"])
        self._last = now
        self._rows.append(row)
        samples = [
            (prompt.messages[-1]["content"], text, f"{reward:+.2f}")
            for prompt, text, reward in zip(prompts, rollout.texts, rewards.tolist(), strict=True)
        ]
        if is_live():
            self._show(row["step"], samples)
            return
        print(self.line(row), flush=True)
        if row["step"] % SAMPLE_EVERY == 0:
            prompt, text, reward = samples[0]
            print(f"    prompt: {shorten(prompt)}")
            print(f"    response (reward {reward}): {shorten(text)}", flush=True)

    def line(self, row: Mapping[str, Any]) -> str:
        """Return a step's metrics as one line of text."""
        left = (self.steps - row["step"]) * sum(self._taken) / max(len(self._taken), 1)
        return (
            f"[{self.title}] step {row['step']}/{self.steps} reward {row['reward']:+.2f} "
            f"(baseline {row['baseline']:+.2f}) kl {row['kl']:.2f} "
            f"length {row['completions/mean_length']:.0f} "
            f"finished {1 - row['completions/clipped_ratio']:.2f}, about {left:.0f} s left"
        )

    def figure(self) -> Figure:
        """Return the curves so far: reward, KL, length and finished share."""
        frame = pd.DataFrame(self._rows)
        frame["finished"] = 1 - frame["completions/clipped_ratio"]
        shown = {
            "reward": "reward, SFT sd",
            "kl": "KL to SFT, nats",
            "completions/mean_length": "length, tokens",
            "finished": "finished share",
        }
        with style():
            fig = Figure(figsize=(10, 2.3))
            for ax, (column, label) in zip(fig.subplots(1, 4), shown.items(), strict=True):
                smooth(ax, frame, column, BLUE, column)
                ax.set_title(label, fontsize=9)
                ax.set_xlim(0, self.steps)
                ax.tick_params(labelsize=8)
            reward = fig.axes[0]
            reward.plot(*measured(frame, "baseline"), color=DARK, lw=1, label="baseline")
            reward.axhline(0, color=GREY, ls="--", label="SFT")
            reward.legend(fontsize=7)
        return fig

    def _show(self, step: int, samples: Sequence[tuple[str, str, str]]) -> None:
        """Update the widgets, and show them if this is the first step."""
        import ipywidgets

        if self.box is None:
            wide = ipywidgets.Layout(width="100%")
            parts = (
                ipywidgets.IntProgress(max=self.steps, description=self.title, layout=wide),
                ipywidgets.Label(),
                ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%")),
                ipywidgets.HTML(),
            )
            self.box = ipywidgets.VBox(parts)
            display(self.box)
        progress, label, image, table = self.box.children
        progress.value, label.value = step, self.line(self._rows[-1])
        every = max(1, self.steps // REFRESHES)
        if len(self._rows) == 1 or step % every == 0 or step == self.steps:
            png = io.BytesIO()
            self.figure().savefig(png, format="png")
            image.value = png.getvalue()
            table.value = html_table(("prompt", "response", "reward"), samples[:3])


def browse_samples(frame: pd.DataFrame) -> Any:
    """Return a view of the policies' answers, side by side.

    Args:
        frame: columns prompt_id, category, prompt, and per policy `response [name]` and any number
            of facts such as `reward [name]`, `kl [name]` or `length [name]`.

    Returns:
        In a live notebook widgets that show one prompt at a time; elsewhere an HTML table of all.
    """
    if not is_live() or frame.empty:
        return HTML(samples_html(frame))
    import ipywidgets

    wide = ipywidgets.Layout(width="90%")
    category = ipywidgets.Dropdown(options=["all", *sorted({*frame["category"].dropna()})])
    prompt = ipywidgets.IntSlider(min=1, max=len(frame), description="prompt", layout=wide)
    view = ipywidgets.HTML()

    def show(_: Any = None) -> None:
        rows = frame if category.value == "all" else frame[frame["category"] == category.value]
        prompt.max = len(rows)
        view.value = samples_html(rows.iloc[[prompt.value - 1]])

    category.observe(show, "value")
    prompt.observe(show, "value")
    show()
    return ipywidgets.VBox([category, prompt, view])


def samples_html(frame: pd.DataFrame) -> str:
    """Return the samples of `browse_samples` as an HTML table: a row per prompt."""
    names = [m[1] for column in frame if (m := re.fullmatch(r"response \[(.+)\]", column))]
    rows = []
    for _, row in frame.iterrows():
        cells = [f"{row['prompt']}\n({row['category']}, {row['prompt_id']})"]
        for name in names:
            ending = f" [{name}]"
            facts = [c for c in frame if c.endswith(ending) and c != f"response{ending}"]
            shown = ", ".join(f"{c.removesuffix(ending)} {_short(row[c])}" for c in facts)
            cells.append(f"({shown})\n{row[f'response{ending}']}")
        rows.append(cells)
    return html_table(["prompt", *names], rows)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _escaped(cell: Any) -> str:
    return html.escape(str(cell)).replace("\n", "<br>")
