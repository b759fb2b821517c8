"""A progress bar with rate and time left, or plain lines where there is no terminal."""

import contextlib
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

_LINE_SECONDS = 30.0


@contextlib.contextmanager
def progress_bar(title: str, total: int, *, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Gives `advance(failed)`: call it after each item, with the number of items that failed so far."""
    if not show:
        yield lambda failed: None
        return
    console = rich.console.Console(stderr=True)
    if not console.is_terminal:
        with _lines(title, total, console) as advance:
            yield advance
        return
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[rate]}"),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[failed]}"),
        console=console,
    )
    with bar:
        task = bar.add_task(title, total=total, rate="", failed="")

        def advance(failed: int) -> None:
            speed = bar.tasks[task].speed
            bar.update(
                task,
                advance=1,
                rate=f"{speed:.1f}/s" if speed else "",
                failed=f"{failed} unreadable" if failed else "",
            )

        yield advance


@contextlib.contextmanager
def _lines(title: str, total: int, console: rich.console.Console) -> Iterator[Callable[[int], None]]:
    start = last = time.monotonic()
    done = bad = 0

    def line() -> None:
        seconds = time.monotonic() - start
        left = f", {seconds / done * (total - done):.0f} s left" if 0 < done < total else ""
        rate = done / max(seconds, 1e-9)
        console.print(f"{title}: {done}/{total}, {rate:.1f}/s, {bad} unreadable{left}", highlight=False)

    def advance(failed: int) -> None:
        nonlocal last, done, bad
        done, bad = done + 1, failed
        if time.monotonic() - last > _LINE_SECONDS:
            last = time.monotonic()
            line()

    yield advance
    line()
