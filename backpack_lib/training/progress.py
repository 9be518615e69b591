"""How training shows that it is getting on: a bar in a terminal, one live figure in a notebook."""

import time
from contextlib import contextmanager

REDRAW_SECONDS = 2.0  # a live figure is drawn at most so often with news, and
REFRESH_SECONDS = 10.0  # without, to show that training goes on


@contextmanager
def make_progress(run, shown: bool = True):
    """Yields an object with `step()` and `row()`, called when a `training.Run` has made a step or a row of history."""
    if not shown:
        yield _Silent()
    elif _in_notebook():
        figure = _LiveFigure(run)
        yield figure
        figure.finish()
    else:
        from tqdm.auto import tqdm

        with tqdm(total=run.config.steps, initial=run.step, desc=run.config.architecture, unit="step") as bar:
            yield _Bar(run, bar)


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return type(get_ipython()).__name__ == "ZMQInteractiveShell"


class _Silent:
    def step(self): ...

    def row(self): ...


class _Bar:
    def __init__(self, run, bar):
        self.run, self.bar = run, bar

    def step(self):
        self.bar.update(self.run.step - self.bar.n)

    def row(self):
        last = self.run.history[-1]
        known = {name: f"{last[name]:.3f}" for name in ("train_loss", "valid_loss", "floor") if name in last}
        self.bar.set_postfix(known | {"tokens/s": f"{last['tokens_per_second']:,.0f}"})


class _LiveFigure:
    """The loss curves so far. One line stays as the cell's output, which can draw the history as it likes."""

    def __init__(self, run):
        from IPython.display import HTML, display

        self.run = run
        self.drawn = time.monotonic()
        self.handle = display(HTML("<i>Training begins.</i>"), display_id=True)

    def step(self):
        if time.monotonic() - self.drawn > REFRESH_SECONDS:
            self._show_progress()

    def row(self):
        if time.monotonic() - self.drawn > REDRAW_SECONDS:
            self._show_progress()

    def finish(self):
        from IPython.display import HTML

        config, last = self.run.config, self.run.history[-1]
        self.handle.update(
            HTML(f"{config.architecture}: {config.steps:,} steps, validation loss {last['valid_loss']:.3f} nats")
        )

    def _show_progress(self):
        from IPython.display import HTML

        where = f"{self.run.config.architecture}, step {self.run.step:,} of {self.run.config.steps:,}"
        if self.run.history:
            self._draw(f"{where}, {self.run.history[-1]['tokens_per_second']:,.0f} tokens/s")
        else:
            self.drawn = time.monotonic()
            self.handle.update(HTML(f"<i>{where}; the first evaluation is on its way.</i>"))

    def _draw(self, title: str):
        import pandas as pd

        from backpack_lib.figures import loss_curves

        self.drawn = time.monotonic()
        self.handle.update(loss_curves({self.run.config.architecture: pd.DataFrame(self.run.history)}, title))
