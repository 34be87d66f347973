"""Progress of a batch run."""

from serve.batch.decoder import Report
from serve.batch.progress import LOG_SECONDS, Display, Tally
from serve.engine.stats import Stats


def report(num_rows, rows_left, seconds, new_tokens, attention_pages=40):
    stats = Stats(
        waiting=3,
        running=2,
        convolution_pages=100,
        convolution_pages_used=30,
        attention_pages=attention_pages,
        attention_pages_used=attention_pages // 4,
        prompt_tokens=0,
        new_tokens=new_tokens,
        preemptions=0,
        steps=1,
    )
    return Report(["{}"] * num_rows, 0, rows_left, seconds, stats)


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_tally_sums_over_engines():
    clock = Clock()
    tally = Tally(num_before=1000, num_failed=1, clock=clock)
    tally.add(0, report(5, 80, seconds=10, new_tokens=400))
    assert tally.status() == (
        "1,005 of about 1,085 rows, 40 tokens/s, about 0:02:40 left\n"
        "2 running, 3 waiting, 30 of 100 convolution pages, 10 of 40 attention pages"
    )
    clock.now += 10
    tally.add(1, report(15, 100, seconds=5, new_tokens=100))
    tally.add(0, report(10, 80, seconds=20, new_tokens=800))
    assert tally.status() == (
        "1,030 of about 1,210 rows, 45 tokens/s, about 0:02:00 left\n"
        "4 running, 6 waiting, 60 of 200 convolution pages, 20 of 80 attention pages"
    )
    assert str(tally) == (
        "30 rows, besides 1,000 from before (1 with an error), 900 tokens in 20.0 s, 45 tokens/s"
    )


def test_speed_is_of_the_last_seconds():
    clock = Clock()
    tally = Tally(0, 0, clock)
    for second in range(100):
        clock.now += 1
        tally.add(0, report(0, 1, second, 10 * second if second < 50 else 500))
    assert ", 0 tokens/s\n" in tally.status()


def test_no_time_is_estimated_before_the_first_row():
    tally = Tally(0, 0, Clock())
    tally.add(0, report(0, 80, 1, 5, attention_pages=0))
    assert "left" not in tally.status()
    assert "attention" not in tally.status()


def test_log_gets_a_line_every_thirty_seconds(capsys):
    clock = Clock()
    tally = Tally(0, 0, clock)
    tally.add(0, report(1, 10, 1, 5))
    with Display(clock) as display:
        for _ in range(3 * LOG_SECONDS):
            clock.now += 1
            display.show(tally)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("1 of about 11 rows, 5 tokens/s, about 0:00:10 left, 2 running")
