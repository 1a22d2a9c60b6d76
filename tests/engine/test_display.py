import io

from rich.console import Console

from unmask.engine.display import LiveDisplay, Pace, PlainDisplay, number

TRAIN = {"step": 5, "epoch": 1.25, "loss": 0.5123, "images_per_second": 1234.5, "memory_mb": 2048.0}


def test_the_loss_stands_beside_its_best_trivial_predictor(capsys):
    display = PlainDisplay(pause=0)
    display.start("mae", 10, 0)
    display.references({"mean of the visible": 0.87, "zero": 1.5})
    display.metrics(TRAIN)
    told = capsys.readouterr()
    assert told.out == ""
    last = told.err.splitlines()[-1]
    assert "mae 5/10" in last
    assert "loss 0.512 (0.87 mean of the visible)" in last
    for part in ("epoch 1.2", "1,234 images/s", "2.0 GB"):
        assert part in last


def test_plain_lines_come_now_and_then_and_at_the_end(capsys):
    display = PlainDisplay(pause=3600)
    display.start("mae", 10, 0)
    for step in range(1, 11):
        display.step(step)
        display.metrics({**TRAIN, "step": step})
    assert [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "mae: step 0 of 10",
        "mae 1/10",
        "mae 10/10",
    ]


def test_a_probe_is_told_once_with_its_step_and_the_last_step_stands_once(capsys):
    display = PlainDisplay(pause=0)
    display.start("mae", 10, 0)
    for step in (5, 10):
        display.step(step)
        display.metrics({**TRAIN, "step": step})
        display.probe({"knn_top1": 0.04321 * step})
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "knn" in line] == [
        "mae: knn_top1 0.216 at step 5",
        "mae: knn_top1 0.432 at step 10",
    ]
    assert sum("10/10" in line for line in lines) == 1


def test_the_time_left_leaves_a_slow_first_step_out():
    pace = Pace(100)
    assert pace.left() == []
    pace.mark(1, 60.0)
    assert pace.left() == []
    pace.mark(2, 61.0)
    assert pace.left() == []
    pace.mark(10, 69.0)
    assert pace.left() == ["1:30 left"]
    pace.mark(100, 159.0)
    assert pace.left() == []


def test_a_terminal_gets_one_living_line():
    text = io.StringIO()
    display = LiveDisplay(Console(file=text, force_terminal=True, width=160))
    display.start("mae", 10, 0)
    display.references({"mean of the visible": 0.87})
    display.metrics(TRAIN)
    display.step(5)
    display.probe({"knn_top1": 0.21})
    display.say("a word")
    display.stop()
    told = text.getvalue()
    assert "loss 0.512 (0.87 mean of the visible)" in told
    assert "5/10" in told
    assert "knn_top1 0.21 at 5" in told
    assert "a word" in told


def test_numbers_have_three_digits():
    assert [number(v) for v in (0.123456, 12.3456, 12345.6, None)] == ["0.123", "12.3", "12,346", "?"]
