import io
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta

import numpy as np
import pytest
from rich.console import Console

from evolkv.cli import console
from evolkv.cli.budgets_map import budgets_map
from evolkv.cli.console import Progress
from evolkv.cli.glyphs import glyphs_for
from evolkv.cli.live import View
from evolkv.cli.standing import Standing, speed
from evolkv.cli.watching import progress_picture
from evolkv.evolution import SearchProgress

SIZES = [(8, 1), (15, 5), (20, 10), (40, 12), (79, 23), (119, 39)]


class Screen:
    """What a terminal shows: enough of one for text, new lines, and the codes that a view uses."""

    def __init__(self, columns, rows):
        self.lines = [[" "] * columns for _ in range(rows)]
        self.x = self.y = 0
        self.cursor_visible = True

    def feed(self, text):
        for code, character in re.findall(r"(\x1b\[[?0-9;]*[A-Za-z])|([\s\S])", text):
            if code:
                self._control(code[2:-1], code[-1])
            elif character == "\n":
                self.x, self.y = 0, self.y + 1
                if self.y == len(self.lines):
                    self.y -= 1
                    self.lines = [*self.lines[1:], [" "] * len(self.lines[0])]
            elif character == "\r":
                self.x = 0
            else:
                self.lines[self.y][self.x] = character
                self.x += 1
        return self

    def _control(self, number, name):
        if name == "A":
            self.y = max(0, self.y - int(number))
        elif name in "KJ":
            self.lines[self.y][self.x :] = [" "] * (len(self.lines[0]) - self.x)
            if name == "J":
                self.lines[self.y + 1 :] = [[" "] * len(self.lines[0]) for _ in self.lines[self.y + 1 :]]
        elif name in "hl":
            assert number == "?25"
            self.cursor_visible = name == "h"
        else:
            assert name == "m"

    @property
    def text(self):
        return "\n".join("".join(line).rstrip() for line in self.lines).rstrip("\n")


def terminal(columns=80, rows=24, encoding="utf-8", **options):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace", newline="")
    options = {"color_system": "truecolor", **options}
    return Console(file=file, force_terminal=True, width=columns, height=rows, _environ={}, **options)


def written(on):
    on.file.flush()
    return on.file.buffer.getvalue().decode(on.encoding)


def budgets(layers, heads, seed=0):
    table = np.random.default_rng(seed).lognormal(4.5, 0.8, (layers, heads)).astype(int) + 1
    return tuple(map(tuple, table.tolist()))


def standing(table=None, generations=12):
    fitnesses = tuple(1 - 1 / (index + 1) for index in range(generations))
    return Standing("search", 140, 280, 0.0, 3.5, 0.91, 0.8723, generations - 1, fitnesses, table or budgets(30, 3))


def plain(lines):
    return ["".join(segment.text for segment in line) for line in lines]


def drawn(step, columns, rows, on=None):
    return progress_picture(step, 1.0, 63.0, columns, rows, glyphs_for(on or terminal()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [(4, 2), (30, 3), (80, 8), (32, 64), (80, 1)])
@pytest.mark.parametrize("options", [{}, {"no_color": True}, {"encoding": "ascii"}])
def test_picture_of_any_model_fits_any_terminal(size, shape, options):
    columns, rows = size
    lines = plain(drawn(standing(budgets(*shape)), columns, rows, terminal(**options)))
    assert 1 <= len(lines) <= rows
    assert max(map(len, lines)) <= columns
    assert lines[0].startswith("search")


def test_view_shows_how_far_how_fast_and_how_good():
    lines = plain(drawn(standing(), 79, 23))
    assert re.fullmatch(r"search ━{20}─{20}  50% 140/280", lines[0])
    assert lines[1] == "3.5/s · 39 s left · 1 min 03 s so far"
    assert lines[2] == "score 0.8723 · fitness 0.9100 · generation 11"
    marks = lines[3].split()[2]
    assert (len(marks), marks[0], marks[-1]) == (12, "▁", "█")
    assert list(marks) == sorted(marks)


def test_many_generations_share_the_columns_of_the_sparkline():
    line = plain(drawn(standing(generations=1000), 60, 23))[3]
    assert len(line) <= 60
    assert line.split()[2].endswith("█")


def test_eighty_layers_of_eight_heads_show_every_cell_on_a_24_line_terminal():
    lines = drawn(standing(budgets(80, 8)), 79, 23)
    assert "mean of" not in "".join(plain(lines))
    cells = [text for text in plain(lines[5:]) if re.match(r"\d [█▀]", text)]
    assert sum(len(re.sub(r"^\d ", "", text)) for text in cells) == 80 * 8


def test_cells_of_a_large_model_are_averaged_where_they_do_not_fit_and_it_says_so():
    table = np.full((80, 8), 10)
    table[79, 7] = 1000
    lines = budgets_map(tuple(map(tuple, table.tolist())), 60, 6, glyphs_for(terminal(no_color=True)))
    title, *rows, axis = plain(lines)
    assert re.search(r"mean of \d", title)
    assert axis.split()[0] == "0"
    cells = [row[2:] for row in rows]
    assert cells[-1][-1] > "▁"
    assert set("".join(cells)[:-1]) == {"▁"}


def test_brightest_cell_is_the_largest_budget():
    table = ((33, 33), (33, 33), (33, 900), (33, 33))
    lines = budgets_map(table, 60, 12, glyphs_for(terminal()))
    colours = [[str(s.style.color.name) for s in line for _ in s.text if s.text[0] == "█"] for line in lines[1:3]]
    assert [len(row) for row in colours] == [8, 8]
    assert [row.index("#fde725") if "#fde725" in row else None for row in colours] == [None, 4]


def test_layers_whose_heads_are_alike_are_bars_of_their_height():
    table = tuple((value,) * 3 for value in (80, 40, 20, 10))
    lines = plain(budgets_map(table, 60, 12, glyphs_for(terminal())))
    assert lines[0] == "budgets 10 to 80  layers across"
    columns = ["".join(row[index] for row in lines[1:-1]).strip() for index in range(3, 15, 3)]
    assert columns == ["█" * 8, "█" * 4, "█" * 2, "█"]
    assert lines[-1].split() == ["0", "1", "2", "3"]


def test_without_colours_only_brightness_is_set():
    on = terminal(no_color=True)
    View(on, lambda columns, rows: drawn(standing(), columns, rows, on)).draw()
    codes = re.findall(r"\x1b\[([0-9;]*)m", written(on))
    assert {number for code in codes for number in code.split(";")} <= {"", "0", "1", "2"}
    assert "▀" not in written(on)


def test_terminal_without_utf8_gets_ascii():
    on = terminal(encoding="ascii")
    View(on, lambda columns, rows: drawn(standing(), columns, rows, on)).draw()
    assert "?" not in written(on).replace("?25", "")
    assert "####" in written(on)


def test_view_leaves_nothing_behind_after_an_exception():
    on = terminal(60, 16)

    def fail():
        with View(on, lambda columns, rows: drawn(standing(), columns, rows, on)):
            shown = Screen(60, 16).feed(written(on))
            assert "score 0" in shown.text
            assert not shown.cursor_visible
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    screen = Screen(60, 16).feed("$ evolkv search\n" + written(on))
    assert screen.text == "$ evolkv search"
    assert screen.cursor_visible
    assert (screen.x, screen.y) == (0, 1)


def test_redrawing_never_blanks_what_is_shown():
    on = terminal(60, 16)
    view = View(on, lambda columns, rows: drawn(standing(), columns, rows, on))
    view.draw()
    first = written(on)
    view.draw()
    screen = Screen(60, 16).feed(first)
    before = screen.text
    for piece in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|[\s\S]", written(on)[len(first) :]):
        assert screen.feed(piece).text == before


def test_smaller_terminal_is_filled_anew():
    on = terminal(80, 24)
    view = View(on, lambda columns, rows: drawn(standing(budgets(80, 8)), columns, rows, on))
    view.draw()
    on.size = (30, 10)
    view.draw()
    # The terminal is still as large as it was: all that the first picture left must be gone.
    lines = Screen(80, 24).feed(written(on)).text.splitlines()
    assert len(lines) <= 9
    assert max(map(len, lines)) <= 29


def test_messages_go_above_the_picture():
    on = terminal(60, 16)
    with View(on, lambda columns, rows: drawn(standing(), columns, rows, on)):
        on.print("evolkv: warning: something to know")
        lines = Screen(60, 16).feed(written(on)).text.splitlines()
    assert lines[0] == "evolkv: warning: something to know"
    assert lines[1].startswith("search")
    assert Screen(60, 16).feed(written(on)).text == lines[0]


def test_updates_are_drawn_at_most_eight_times_a_second():
    on, seen = terminal(), []
    with View(on, lambda columns, rows: seen.append(time.monotonic()) or drawn(standing(), columns, rows, on)) as view:
        patience = time.monotonic() + 60
        while len(seen) < 5 and time.monotonic() < patience:
            view.update()
            time.sleep(0.001)
    assert len(seen) == 5
    assert min(np.diff(seen)) > 0.1


def test_a_terminal_that_is_gone_does_not_end_the_work():
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    on = Console(file=Gone(), force_terminal=True, width=80, height=24)
    with View(on, lambda columns, rows: drawn(standing(), columns, rows, on)) as view:
        view.draw()
    assert not view._thread.is_alive()


@pytest.fixture
def settings():
    console.prepare()
    yield console.settings
    console.prepare()


def feed(progress, generations=3):
    """A search: prefill, generations that become fitter, validation."""
    for done in (1, 2):
        progress.of_search(SearchProgress("prefill", done, 2))
    for index in range(generations):
        table = [list(row) for row in budgets(4, 2, seed=index)]
        progress.of_search(
            SearchProgress("search", 10 * (index + 1), 30, index / 4, index / 5, table, index / 4, index)
        )
    progress.of_search(SearchProgress("validation", 1, 1))


def test_without_a_terminal_progress_is_plain_lines(settings, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress() as progress:
        feed(progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err
    lines = err.splitlines()
    assert [line.split(",")[0] for line in lines] == (
        ["prefill 1/2", "prefill 2/2", "search 10/30", "search 30/30", "validation 1/1"]
    )
    assert "score 0.4000, fitness 0.5000" in lines[3]


def test_quiet_progress_says_nothing(settings, capsys):
    settings.quiet = settings.log_json = True
    with Progress() as progress, console.busy("loading"):
        feed(progress)
    console.note("a note")
    console.warn("a warning")
    assert capsys.readouterr() == ("", "")


def test_log_json_writes_one_object_per_line(settings, capsys):
    settings.log_json = True
    with Progress() as progress, console.busy("loading x"):
        feed(progress)
        console.warn("something\nto know")
        console.say("evolkv: interrupted")
    out, err = capsys.readouterr()
    assert out == ""
    events = [json.loads(line) for line in err.splitlines()]
    for event in events:
        assert datetime.fromisoformat(event["time"]).utcoffset() == timedelta(0)
    steps = [event for event in events if event["event"] == "progress"]
    fields = {"stage", "done", "total", "rate", "seconds_left", "best_fitness", "best_score", "generation", "budget"}
    fields |= {"selector"}
    assert all(set(step) == fields | {"event", "time"} for step in steps)
    assert [(step["stage"], step["done"]) for step in steps] == (
        [("prefill", 1), ("prefill", 2), ("search", 10), ("search", 30), ("validation", 1)]
    )
    bred = [event for event in events if event["event"] == "generation"]
    assert [event["generation"] for event in bred] == [0, 1, 2]
    assert [event["fitness"] for event in bred] == [0, 0.25, 0.5]
    assert bred[-1]["best_score"] == 0.4
    assert bred[-1]["budgets"] == [list(row) for row in budgets(4, 2, seed=2)]
    said = [(event["event"], event["message"]) for event in events if "message" in event]
    assert said == [("note", "loading x"), ("warning", "something\nto know"), ("note", "interrupted")]


def test_numbers_that_json_lacks_become_null(settings, capsys):
    settings.log_json = True
    console.emit("progress", best_fitness=-math.inf, best_score=math.nan, done=1)
    event = json.loads(capsys.readouterr().err)
    assert (event["best_fitness"], event["best_score"], event["done"]) == (None, None, 1)


def test_what_is_done_all_at_once_has_no_rate(settings, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    progress = Progress()
    for done in range(1, 5):
        progress("examples", done, 8)
        clock[0] += 0.0003
    assert progress._standing.rate is None
    clock[0] += 8
    progress("examples", 5, 8)
    assert progress._standing.rate == pytest.approx(0.5, rel=0.01)


def test_time_left_follows_the_pace_of_the_last_minute(settings, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    progress = Progress()
    for _ in range(10):
        progress("search", progress._standing.done + 100 if progress._standing else 0, 10_000)
        clock[0] += 1
    assert progress._standing.rate == 100
    for _ in range(20):
        clock[0] += 10
        progress("search", progress._standing.done + 10, 10_000)
    assert progress._standing.rate == pytest.approx(1, rel=0.05)
    left = progress._standing.seconds_left(clock[0])
    assert left == pytest.approx(10_000 - progress._standing.done, rel=0.05)
    assert progress._standing.seconds_left(clock[0] + 60) == pytest.approx(left - 60)


@pytest.mark.parametrize("targets", [(None, None), (128, 64)])
def test_another_search_starts_a_new_sparkline(settings, capsys, targets):
    settings.log_json = True
    progress = Progress()
    generations = [(0, 0.1, targets[0]), (1, 0.2, targets[0]), (0, 0.5, targets[1]), (1, math.nan, targets[1])]
    for generation, fitness, budget in [*generations, (2, 0.7, targets[1])]:
        step = SearchProgress("search", 1, 9, score=1.0, fitness=fitness, generation=generation, budget=budget)
        progress.of_search(step)
    assert progress._standing.fitnesses == (0.5, 0.7)
    events = map(json.loads, capsys.readouterr().err.splitlines())
    assert [event["generation"] for event in events if event["event"] == "generation"] == [0, 1, 0, 1, 2]


def test_searches_of_one_generation_each_are_told_apart(settings, capsys):
    settings.log_json = True
    progress = Progress()
    for budget in (128, 64):
        progress.of_search(SearchProgress("search", 9, 9, score=1.0, fitness=0.5, generation=0, budget=budget))
    events = map(json.loads, capsys.readouterr().err.splitlines())
    assert [event["budget"] for event in events if event["event"] == "generation"] == [128, 64]


def test_slow_work_has_a_rate_that_can_be_read():
    assert [speed(rate) for rate in (250, 3.21, 0.5, 0.004)] == ["250/s", "3.2/s", "30.0/min", "14.4/h"]


PROGRAM = """
import signal, sys, time
from evolkv.cli import console
from evolkv.evolution import SearchProgress
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
console.prepare()
print("$ evolkv search", flush=True)
try:
    with console.Progress() as progress:
        budgets = [[33, 700]] * 30
        progress.of_search(SearchProgress("search", 5, 10, .9, .8, budgets, fitness=.9, generation=0))
        console.warn("look")
        if sys.argv[1] == "fail":
            signal.sigwait([signal.SIGUSR1])
            raise RuntimeError("failed")
        time.sleep(600)
except (KeyboardInterrupt, RuntimeError):
    print("over", flush=True)
"""


def _take_terminal():
    os.close(os.open(os.ttyname(0), os.O_RDWR))
    # Tests that run in the background may have inherited that it is ignored.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("end", ["interrupt", "fail"])
def test_real_terminal_is_clean_after_the_end(end):
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "60", "LINES": "16"}
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, end],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
        # Its own session, with this terminal: Ctrl-C is then a key like on any other.
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(slave)
    output, shown = b"", ""
    try:
        while select.select([master], [], [], 120)[0]:
            try:
                output += os.read(master, 65536)
            except OSError:
                break
            if not shown and b"heads down" in output and b"look" in output:
                shown = Screen(60, 16).feed(output.decode(errors="ignore")).text
                if end == "interrupt":
                    os.write(master, b"\x03")
                else:
                    child.send_signal(signal.SIGUSR1)
        assert child.wait(120) == 0
    finally:
        child.kill()
        os.close(master)
    assert "evolkv: warning: look" in shown
    assert "score 0.8000" in shown
    screen = Screen(60, 16).feed(output.decode().replace("^C", ""))
    assert screen.text.splitlines() == ["$ evolkv search", "evolkv: warning: look", "over"]
    assert screen.cursor_visible
