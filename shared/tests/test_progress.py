import io
import sys

from decathlon.shared.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_it_hands_on_the_items(capsys):
    assert list(progress(iter("abc"), total=3, desc="letters")) == ["a", "b", "c"]


def test_without_a_terminal_there_are_lines_and_no_control_characters(monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(sys, "stderr", output)
    for _ in progress(range(1000), desc="steps", unit="step"):
        pass
    text = output.getvalue()
    assert "\r" not in text and "\x1b" not in text
    assert 1 <= len(text.splitlines()) <= 3  # not one for each step
    assert all(line.startswith("steps") for line in text.splitlines())


def test_without_a_terminal_lines_come_at_intervals(monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(sys, "stderr", output)
    bar = progress(total=100, desc="steps", unit="step", leave=True)
    bar.mininterval = 0.0
    for _ in range(4):
        bar.update(25)
        bar.refresh()
    bar.close()
    lines = output.getvalue().splitlines()
    assert "100%" in lines[-1] and "step/s" in lines[-1] and len(lines) >= 4


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch):
    output = Terminal()
    monkeypatch.setattr(sys, "stderr", output)
    bar = progress(range(5), desc="steps")
    assert list(bar) == [0, 1, 2, 3, 4]
    drawn = output.getvalue()
    assert drawn.startswith("\rsteps:   0%") and drawn.endswith("\r") and "\n" not in drawn


def test_it_can_be_silent(monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(sys, "stderr", output)
    assert list(progress(range(3), disable=True)) == [0, 1, 2]
    assert output.getvalue() == ""


def test_lines_end_with_the_whole(capsys):
    for _ in progress(range(3), desc="steps"):
        pass
    assert "100%" in capsys.readouterr().err.splitlines()[-1]
