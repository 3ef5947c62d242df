"""The traces that come with Baton, and files of their format."""

import gzip
import statistics
from itertools import pairwise

import pytest

from baton.errors import BadConfig
from loadgen import traces
from loadgen.traces import Row, Scale

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def variation(times):
    gaps = [b - a for a, b in pairwise(times)]
    return statistics.pstdev(gaps) / statistics.fmean(gaps)


def test_the_traces_are_those_of_the_paper():
    code, conv = traces.read("code"), traces.read("conv")
    assert (len(code), len(conv)) == (8819, 19366)
    assert code[0] == Row(0.0, 4808, 10)
    assert code[1] == Row(pytest.approx(0.052, abs=1e-6), 3180, 8)
    # Splitwise: medians of 1,500 and 13 tokens for coding, 1,020 and 129 for conversation.
    for rows, prompt, output in ((code, 1500, 13), (conv, 1020, 129)):
        assert statistics.median(row.prompt_tokens for row in rows) == pytest.approx(prompt, rel=0.03)
        assert statistics.median(row.output_tokens for row in rows) == pytest.approx(output, abs=1)
    assert code[-1].at_s / 60 == pytest.approx(57.3, abs=0.1)


def test_at_another_rate_bursts_stay_as_they_were():
    rows = traces.window(traces.read("code"), 0.0, 2000)
    due = traces.arrivals(rows, 0.5)
    assert due[0] == 0.0
    assert 2000 / (due[-1] * 2000 / 1999) == pytest.approx(0.5)
    assert variation(due) == pytest.approx(variation([row.at_s for row in rows]))
    assert variation(due) > 5, "a Poisson process has 1"


def test_a_window_begins_where_it_was_asked_and_is_never_shorter():
    rows = tuple(Row(float(i), 1, 1) for i in range(10))
    assert [row.at_s for row in traces.window(rows, 2.5, 3)] == [3.0, 4.0, 5.0]
    assert traces.arrivals(rows[3:6], 2.0) == pytest.approx((0.0, 0.5, 1.0))
    assert traces.arrivals(rows[:1], 2.0) == (0.0,)
    with pytest.raises(BadConfig, match="has 2 requests from second 8 on, expected 3"):
        traces.window(rows, 8.0, 3)


def test_lengths_are_scaled_then_limited_and_never_zero():
    scale = Scale(prompt=0.25, output=0.5, max_prompt_tokens=600, max_output_tokens=100)
    assert scale.apply(Row(0.0, 2000, 100)) == (500, 50)
    assert scale.apply(Row(0.0, 4000, 1000)) == (600, 100)
    assert scale.apply(Row(0.0, 1, 0)) == (1, 1)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_a_file_of_the_same_format_is_read_in_order_of_arrival(tmp_path, name):
    text = HEAD + "2024-05-10 00:00:02.5+00:00,7,3\n2024-05-10 00:00:00.1234567,5,2"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert traces.read(str(tmp_path / name)) == (Row(0.0, 5, 2), Row(pytest.approx(2.376544), 7, 3))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("TIMESTAMP,ContextTokens\n", "no column GeneratedTokens"),
        (HEAD, "has no request"),
        (HEAD + "2024-05-10 00:00:00,five,2\n", "line 2: invalid literal"),
        (HEAD + "yesterday,5,2\n", "line 2: Invalid isoformat"),
        (HEAD + "2024-05-10 00:00:00,5\n", "line 2: "),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path, text, said):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(BadConfig, match=said):
        traces.read(str(path))


def test_a_name_that_is_no_trace_and_no_file_is_refused():
    with pytest.raises(BadConfig, match=r"'chat' cannot be read: .* expected code or conv, or a CSV file"):
        traces.read("chat")
