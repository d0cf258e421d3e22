import json
import multiprocessing

import pytest

from hf_momentum.results.record import append_record, identifier, package_versions, read_records


def test_identifier_is_stable_and_ignores_order():
    assert identifier({"b": 1, "a": [1, 2]}) == identifier({"a": [1, 2], "b": 1}) == "94a786c3662bc7be"
    assert identifier({"a": 1}) != identifier({"a": 2})


def test_round_trip_and_one_line_per_record(tmp_path):
    file = tmp_path / "new" / "results.jsonl"
    append_record(file, {"a": 1, "text": "two\nlines · ℓ"})
    append_record(file, {"a": 2})
    assert [record["a"] for record in read_records(file).records] == [1, 2]
    assert read_records(file).records[0]["text"] == "two\nlines · ℓ"
    assert file.read_text().count("\n") == 2


def test_missing_file_holds_nothing(tmp_path):
    assert read_records(tmp_path / "none.jsonl").records == []


def test_torn_last_line_is_reported_and_does_not_swallow_the_next(tmp_path):
    file = tmp_path / "results.jsonl"
    append_record(file, {"a": 1})
    with file.open("a") as torn:
        torn.write('{"format": 1, "a": 2, "b')
    append_record(file, {"a": 3})
    results = read_records(file)
    assert [record["a"] for record in results.records] == [1, 3]
    assert len(results.problems) == 1
    assert results.problems[0].startswith(f"{file}:2: not a whole JSON object")


@pytest.mark.parametrize("line", ["[1]", '{"format": 99}', '{"a": 1}'])
def test_foreign_lines_are_reported(tmp_path, line):
    file = tmp_path / "results.jsonl"
    file.write_text(line + "\n")
    results = read_records(file)
    assert results.records == []
    assert results.problems == [f"{file}:1: not a record of format 1; the line is left out."]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused_and_nothing_is_written(tmp_path, value):
    file = tmp_path / "results.jsonl"
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_record(file, {"a": value})
    assert not file.exists()


def _write_many(file, writer):
    for index in range(200):
        append_record(file, {"writer": writer, "index": index, "padding": "x" * 3000})


def test_two_writers_at_once_lose_nothing(tmp_path):
    file = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(file, writer)) for writer in range(2)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    results = read_records(file)
    assert not results.problems
    assert sorted((r["writer"], r["index"]) for r in results.records) == [(w, i) for w in range(2) for i in range(200)]
    assert len({json.loads(line)["writer"] for line in file.read_text().splitlines()}) == 2


def test_package_versions_name_what_is_missing():
    versions = package_versions(("torch", "no-such-distribution"))
    assert versions["torch"][0].isdigit()
    assert versions["no-such-distribution"] is None
