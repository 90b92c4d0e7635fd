"""Promises of `make bench-serving`: the verdicts on the measurements, and that a run that is stopped leaves nothing.
The whole of it runs in tests/test_serving_vllm.py."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import figures, serving
from benchmarks.load import drive, get, post
from jobs.core.errors import UserError
from tests.build_server import BASE, StandIn, running


def test_a_percentile_is_one_of_the_values() -> None:
    values = list(range(100, 0, -1))
    assert [figures.percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert figures.percentile([7.0], 0.99) == 7
    with pytest.raises(ValueError, match="no values"):
        figures.percentile([], 0.5)


def test_ratios_and_differences_are_taken_within_a_round() -> None:
    # The machine got ten times slower in the second half; the guard cost 1 % all the while.
    plain = [100.0] * 6 + [10.0] * 6
    guard = [0.99 * value for value in plain]
    assert figures.ratios(guard, plain).middle == pytest.approx(0.99)
    assert figures.ratios(guard, plain).low == pytest.approx(figures.ratios(guard, plain).high)
    assert figures.differences([3.0, 5.0, 7.0], [2.0, 4.0, 6.0]) == figures.Interval(1.0, 1.0, 1.0)


def test_the_interval_holds_the_median_is_wider_with_more_noise_and_the_same_every_time() -> None:
    calm, noisy = [0.99, 1.0, 1.0, 1.01, 1.0, 0.99], [0.8, 1.2, 1.0, 1.1, 0.9, 1.0]
    found = figures.median_of(noisy)
    assert found == figures.median_of(noisy)
    assert min(noisy) <= found.low < found.middle < found.high <= max(noisy)
    assert figures.median_of(calm).high - figures.median_of(calm).low < found.high - found.low


@pytest.mark.parametrize(("low", "high", "verdict"), [
    (0.985, 1.01, "met"), (0.98, 0.98, "met"), (0.9, 0.97, "missed"), (0.97, 0.99, "unclear"), (0.5, 1.5, "unclear")])
def test_a_target_is_met_or_missed_only_when_the_whole_interval_says_so(low: float, high: float, verdict: str) -> None:
    assert figures.verdict(figures.Interval(0.99, low, high), at_least=0.98) == verdict
    assert figures.verdict(figures.Interval(-0.99, -high, -low), at_most=-0.98) == verdict


def test_one_measure_that_misses_the_target_is_enough() -> None:
    assert figures.overall(["met", "met"]) == "met"
    assert figures.overall(["met", "unclear"]) == "unclear"
    assert figures.overall(["unclear", "missed", "met"]) == "missed"


def results(ratio: float, more_ms: float) -> serving.Results:
    """Rounds in which the guard has `ratio` of the throughput and `more_ms` of latency on top, and no noise."""
    made = serving.Results()
    for load in serving.LOADS:
        for requests in (90.0, 95.0, 100.0, 100.0, 105.0, 110.0):
            made.rounds[load, "plain"].append(serving.Measured(requests, 50.0, 5.0, 9.0, 3.0, 40))
            made.rounds[load, "guard"].append(serving.Measured(ratio * requests, 50.0 + more_ms, 5.0, 9.0, 3.1, 40))
    return made


def test_the_conclusion_says_what_the_table_shows() -> None:
    met = serving.conclusion(serving.rows(results(0.99, 0.5)), 6)
    assert [("the target is met" in line) for line in met] == [True, True]
    missed = serving.conclusion(serving.rows(results(0.97, 0.5)), 6)
    assert "the target is missed" in missed[0] and "8 clients, streams: requests/s 0.970" in missed[0]
    assert "the target is met" in missed[1]
    assert "No verdict" in serving.conclusion(serving.rows(results(0.97, 0.5)), 5)[0]
    slow = serving.conclusion(serving.rows(results(0.99, 1.5)), 6)
    assert "the target is missed" in slow[1] and "whole request p50 +1.50" in slow[1]


def test_the_table_has_both_sides_of_every_load() -> None:
    rows = serving.rows(results(0.99, 0.5))
    assert {row.load for row in rows} == set(map(str, serving.LOADS))
    tokens = next(row for row in rows if row.measure == "output tokens/s")
    assert (tokens.plain, tokens.guard, tokens.ratio) == ("3200", "3168", "0.990 (0.990 to 0.990)")
    first = next(row for row in rows if row.measure == "time to first token p50, ms")
    assert (first.plain, first.guard, first.difference, first.verdict) == (
        "5.00", "5.00", "+0.00 (+0.00 to +0.00)", "met")


def test_the_prose_of_the_report_has_at_most_100_columns() -> None:
    made = results(0.97, 1.5)
    made.swaps |= {False: [0.3], True: [0.5]}
    made.idle_share |= {side: [0.02] for side in serving.SIDES}
    made.others_share, made.stolen_share = [0.03], [0.03]
    text = serving.report(made, "python -m benchmarks.serving", 0.1)
    assert all(len(line) <= 100 for line in text.splitlines() if not line.startswith("|"))
    assert "| swap, s " in text and "Target: the guard costs" in text


def test_the_result_replaces_the_one_before_and_leaves_the_rest_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.md"
    file.write_text(f"before\n{serving.BEGIN}\nold\n{serving.END}\nafter\n")
    serving.write(file, "new")
    serving.write(file, "newer")
    assert file.read_text() == f"before\n{serving.BEGIN}\n\nnewer\n\n{serving.END}\nafter\n"


@pytest.mark.parametrize("text", [None, "no place", serving.BEGIN, f"{serving.END}\n{serving.BEGIN}"])
def test_a_file_without_a_place_for_the_result_is_refused_before_anything_runs(
        tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "benchmarks.md"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=r"benchmarks\.md"):
        serving.check_writable(file)
    assert serving.main(["--quick", "--write", str(file)]) == 2
    assert "benchmarks.md" in capsys.readouterr().err


def test_the_client_sends_what_it_should_and_reads_whole_replies_and_streams(
        monkeypatch: pytest.MonkeyPatch) -> None:
    class NoGuard:  # the stand-in for vLLM alone
        def __init__(self, app: object) -> None:
            self.app = app

        async def __call__(self, *message: object) -> None:
            await self.app(*message)  # type: ignore[operator]

    monkeypatch.setattr("tests.build_server.Guard", NoGuard)
    vllm = StandIn()
    sent = [post("/v1/completions", {"model": BASE, "prompt": str(i), "stream": i % 2 == 1}) for i in range(20)]
    with running(vllm.app()) as url:
        port = int(url.rpartition(":")[2])
        seconds, replies = asyncio.run(drive(port, sent, 3))
        missing = asyncio.run(drive(port, [get("/v1/models"), post("/v1/completions", {"model": "x"})], 1))[1]
    assert sorted(int(each["prompt"]) for each in vllm.asked) == list(range(20))
    assert [reply.status for reply in replies] == [200] * 20
    assert [len(reply.events()) for reply in replies] == [1, 2] * 10
    assert {event["model"] for reply in replies for event in reply.events()} == {BASE}
    assert all(0 < reply.first <= reply.seconds < seconds for reply in replies)
    assert [reply.status for reply in missing] == [200, 404]


def test_a_connection_that_is_lost_is_a_failed_request() -> None:
    async def lost() -> int:
        async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        async with server:
            return (await drive(server.sockets[0].getsockname()[1], [get("/")], 1))[1][0].status

    assert asyncio.run(lost()) == 0


def benchmark(*flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "benchmarks.serving", *flags], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


def servers_of(folder: Path) -> list[str]:
    """The command lines of processes that serve what is in a folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TMPDIR={folder}" in file.read_text(errors="replace"):
                found.append((file.parent / "cmdline").read_text())
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_run_that_is_stopped_leaves_no_server_and_no_files() -> None:
    process = benchmark("--quick")
    try:
        check_stopped(process)
    finally:
        process.kill()


def check_stopped(process: subprocess.Popen[str]) -> None:
    assert process.stderr
    folder = next(Path(line.split()[-1]) for line in process.stderr if "their logs are in" in line)
    deadline = time.monotonic() + 60
    while len(servers_of(folder)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    assert servers_of(folder) == []
    assert not folder.exists()
