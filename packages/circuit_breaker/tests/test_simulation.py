"""What-if: traces through configurations, suggestions, files, the command."""

from pathlib import Path

import pytest

from mainstay.circuit_breaker import BreakerConfig, State
from mainstay.circuit_breaker.simulation import RecordedCall, read_trace, simulate, suggest
from mainstay.cli import main


def outage(seconds: float = 30.0) -> list[RecordedCall]:
    """Ten calls a second for two minutes; from the 60th second on everything fails for `seconds`, slowly."""
    trace = []
    for number in range(1200):
        at = number / 10
        failed = 60 <= at < 60 + seconds
        trace.append(RecordedCall(at, 2.0 if failed else 0.05, failed))
    return trace


def test_an_outage_is_met_and_its_waiting_saved() -> None:
    """It opens while calls fail, rejects most of them, and loses few that would have succeeded."""
    report = simulate(outage(), BreakerConfig(window_seconds=10, break_seconds=2, max_break_seconds=4))
    assert (report.calls, report.failures) == (1200, 300)
    # Failures take 2 s to be known, and five seconds of them are half of a window of 9 to 10 s.
    assert report.first_failure_to_open_seconds is not None
    assert 2 + 3.5 < report.first_failure_to_open_seconds < 2 + 5.5
    assert report.failures_saved > 200
    assert report.seconds_saved == pytest.approx(2.0 * report.failures_saved)
    assert report.rejected == report.failures_saved + report.successes_lost
    assert report.successes_lost < 100
    assert [move.after for move in report.moves][-2:] == [State.RAMPING, State.CLOSED]
    assert f"rejected {report.rejected}" in str(report)
    again = simulate(outage(), BreakerConfig(window_seconds=10, break_seconds=2, max_break_seconds=4))
    assert str(again) == str(report)


def test_a_candidate_that_never_opens_saves_nothing() -> None:
    """The report says so, and an empty trace is no error."""
    report = simulate(outage(), BreakerConfig(minimum_calls=100_000))
    assert (report.openings, report.rejected, report.first_failure_to_open_seconds) == ([], 0, None)
    assert simulate([], BreakerConfig()).calls == 0


def test_a_rehearsal_tells_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """Openings that did not happen are in no log and no metric."""
    from prometheus_client import REGISTRY

    simulate(outage(), BreakerConfig(window_seconds=10))
    assert caplog.records == []
    labels = {"breaker": "simulation", "outcome": "success"}
    assert REGISTRY.get_sample_value("mainstay_circuit_breaker_calls_total", labels) is None


def test_suggestions_follow_from_the_trace() -> None:
    """Rate, usual failures and good answers' times become thresholds that meet the outage and not the usual day."""
    usual = [RecordedCall(number / 10, 0.05 + number % 100 / 1000, number % 50 == 0) for number in range(3000)]
    suggestion = suggest(usual)
    config = suggestion.config
    assert simulate(usual, config).openings == []
    assert len(simulate(outage(), config).openings) >= 1
    assert (config.window_seconds, config.minimum_calls, config.failure_ratio) == (10, 20, 0.25)
    assert config.slow_seconds == pytest.approx(0.44, abs=0.02)
    assert len(suggestion.reasons) == 4
    assert str(suggestion).startswith("BreakerConfig(window_seconds=10.0, minimum_calls=20, failure_ratio=0.25, slow_")
    with pytest.raises(ValueError, match="a trace of 5 calls over"):
        suggest(usual[:5])


def test_traces_are_read_from_csv_and_json_lines(tmp_path: Path) -> None:
    """Both forms give the same records."""
    table = tmp_path / "trace.csv"
    table.write_text("at,seconds,failed\n0.5,0.1,false\n1,2,TRUE\n")
    lines = tmp_path / "trace.jsonl"
    lines.write_text('{"at": 0.5, "seconds": 0.1, "failed": false}\n\n{"at": 1, "seconds": 2, "failed": true}\n')
    assert (
        read_trace(table)
        == read_trace(lines)
        == [RecordedCall(0.5, 0.1, failed=False), RecordedCall(1.0, 2.0, failed=True)]
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2: no object"),
        ("[1]", "line 2: no object"),
        ('{"seconds": 1, "failed": true}', "line 2: at is None; it is a number"),
        ('{"at": 1, "seconds": -1, "failed": true}', "line 2: seconds is -1"),
        ('{"at": "x", "seconds": 1, "failed": true}', "line 2: at is 'x'"),
        ('{"at": 1, "seconds": NaN, "failed": true}', "line 2: seconds is nan"),
        ('{"at": 1, "seconds": 1, "failed": "perhaps"}', "line 2: failed is 'perhaps'; it is true or false"),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path: Path, line: str, message: str) -> None:
    """Broken JSON, missing fields, impossible numbers."""
    file = tmp_path / "trace.jsonl"
    file.write_text(f'{{"at": 0, "seconds": 0, "failed": false}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        read_trace(file)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`simulate` and `suggest` print what they find; a bad file or configuration is status 2 with its reason."""
    file = tmp_path / "trace.csv"
    rows = [f"{record.at},{record.seconds},{record.failed}" for record in outage()]
    file.write_text("at,seconds,failed\n" + "\n".join(rows))
    assert main(["breakers", "simulate", str(file), "--config", '{"window_seconds": 10}']) == 0
    assert "1200 calls, 300 failed; it would have opened" in capsys.readouterr().out
    assert main(["breakers", "suggest", str(file)]) == 0
    assert "minimum_calls: a fifth of them" in capsys.readouterr().out
    assert main(["breakers", "simulate", str(file), "--config", '{"failure_ratio": 5}']) == 2
    assert "failure_ratio" in capsys.readouterr().err
    assert main(["breakers", "suggest", str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in capsys.readouterr().err


def test_an_opening_for_slow_calls_is_measured_from_no_failure() -> None:
    """Where no call had failed before it opened, there is no time between the two."""
    slow = [RecordedCall(number / 10, 5.0, failed=False) for number in range(300)]
    for trace in (slow, [*slow, RecordedCall(40.0, 0.1, failed=True)]):
        report = simulate(trace, BreakerConfig(slow_seconds=1, window_seconds=10))
        assert report.openings
        assert report.first_failure_to_open_seconds is None


def test_traces_from_spreadsheets_are_read_and_empty_ones_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A byte order mark and blanks after commas are no part of a heading; a file without a record is an error."""
    file = tmp_path / "trace.csv"
    file.write_text("\ufeffat, seconds, failed\n0.5, 0.1, false\n", encoding="utf-8")
    assert read_trace(file) == [RecordedCall(0.5, 0.1, failed=False)]
    for name, text in (("a.csv", ""), ("b.csv", "at,seconds,failed\n"), ("c.jsonl", "\n")):
        (tmp_path / name).write_text(text)
        assert main(["breakers", "simulate", str(tmp_path / name)]) == 2
        assert f"{name} has no records" in capsys.readouterr().err
