"""A progress bar for work that is mostly done in no time, such as to look up what was measured before."""

from __future__ import annotations

from typing import Any

# Seconds of slow work that pass before a bar is shown.
DELAY = 2.0


class LateBar:
    """A bar of tqdm that appears some seconds after the first `begin`: not at all where no part takes time.

    A context manager. Without tqdm, which is imported only then, there is none.

    Args:
        what: stands beside it.
        unit: of a part.
        shown: whether there is a bar.

    Example:
        >>> with LateBar("read", "page", shown=False) as bar:
        ...     bar.expect(1)
        ...     bar.begin()
        ...     bar.step()
    """

    def __init__(self, what: str, unit: str, shown: bool) -> None:
        self.what, self.unit, self.shown = what, unit, shown
        self.total = self.done = 0
        self._bar: Any = None

    def expect(self, parts: int) -> None:
        """So many parts are to come, beside those of earlier calls."""
        self.total += parts
        if self._bar is not None:
            self._bar.total = self.total

    def begin(self) -> None:
        """What comes now takes time."""
        if not self.shown or self._bar is not None:
            return
        try:
            from tqdm.auto import tqdm
        except ImportError:
            self.shown = False
            return
        self._bar = tqdm(desc=self.what, unit=self.unit, total=self.total, initial=self.done, delay=DELAY)

    def step(self) -> None:
        """A part is done."""
        self.done += 1
        if self._bar is not None:
            self._bar.update()

    def __enter__(self) -> LateBar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
