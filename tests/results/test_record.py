import json
import multiprocessing

import pytest
from sample_runs import run

from hf_momentum.errors import UserError
from hf_momentum.results.record import (
    append_record,
    find_fault,
    identifier,
    package_versions,
    read_records,
    read_results,
)


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


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[1]", "not a record of format 1"),
        (b'{"a": 1}', "not a record of format 1"),
        (b'{"format": 99}', "a record of format 99, and this version reads format 1"),
        (b'{"format": 1, "a": NaN}', "NaN is not a value of JSON"),
        (b'{"format": 1, "a": "\xff"}', "not UTF-8 text (invalid start byte)"),
        (b'{"format": 1', "not a whole JSON object (Expecting ',' delimiter)"),
    ],
)
def test_bad_lines_are_reported_and_the_rest_used(tmp_path, line, reason):
    file = tmp_path / "results.jsonl"
    file.write_bytes(b'{"format": 1, "b": 1}\n' + line + b'\n{"format": 1, "b": 2}\n')
    results = read_records(file)
    assert [record["b"] for record in results.records] == [1, 2]
    assert results.places == [f"{file}:1", f"{file}:3"]
    assert results.problems == [f"{file}:2: {reason}; the line is left out."]


def test_of_two_lines_on_one_run_and_stage_the_later_stands(tmp_path):
    file = tmp_path / "results.jsonl"
    dev, test = run("sgd", 13, None), run("sgd", 13, 0.6)
    again = test | {"test_accuracy": 0.7}
    for record in (dev, test, again, test | {"group_id": "another grid's", "group": "wider"}):
        append_record(file, record)
    results = read_records(file)
    assert [record["test_accuracy"] for record in results.records] == [None, 0.7, 0.6]
    assert results.problems == [f"{file}:2: the same run and stage as {file}:3; the later line stands."]


def test_several_files_are_one_result_each_read_once(tmp_path):
    first, second = tmp_path / "results.jsonl", tmp_path / "other.jsonl"
    append_record(first, run("sgd", 13, 0.6))
    append_record(second, run("sgd", 13, 0.7))
    append_record(second, run("sgd", 21, 0.8))
    results = read_results([tmp_path, first, second])
    assert [record["test_accuracy"] for record in results.records] == [0.7, 0.8]
    assert results.problems == [f"{first}:1: the same run and stage as {second}:1; the later line stands."]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": None}, "a trained result whose 'seed' is None"),
        ({"optim": 3}, "a result whose 'optim' is 3"),
        ({"test_accuracy": "0.5"}, "a result whose 'test_accuracy' is '0.5'"),
        ({"momentum": [0.9]}, "a result whose 'momentum' is [0.9]"),
        ({"steps": True}, "a result whose 'steps' is True"),
        ({"seed": "13"}, "a result whose 'seed' is '13'"),
        ({"test_accuracy": 57.2}, "a result whose 'test_accuracy' is 57.2"),
        ({"dev_accuracy": -0.1}, "a result whose 'dev_accuracy' is -0.1"),
        ({"weight_decay": "a"}, "a result whose 'weight_decay' is 'a'"),
        ({"lr_form": 3}, "a result whose 'lr_form' is 3"),
        ({"regime": 5}, "a result whose 'regime' is 5"),
        ({"command": ["python"]}, "a result whose 'command' is ['python']"),
        ({"arguments": "x"}, "a result whose 'arguments' is 'x'"),
        ({"hardware": "x"}, "a result whose 'hardware' is 'x'"),
        ({"hardware": {"cores": "2"}}, "a result whose 'hardware.cores' is '2'"),
        ({"hardware": {"devices": [["H200"]]}}, "a result whose 'hardware.devices' is [['H200']]"),
        ({"data": {"source": "disk"}}, "a result whose 'data' is {'source': 'disk'}"),
        ({"data": {"source": "hub"}}, "a result whose 'data' is {'source': 'hub'}"),
        ({"data": {"source": "demo", "test_examples": "9"}}, "a result whose 'data.test_examples' is '9'"),
        ({"curve": {"step": 1}}, "a result whose 'curve' is {'step': 1}"),
        ({"curve": [{"dev_accuracy": 0.5}]}, "a result whose 'curve' is [{'dev_accuracy': 0.5}]"),
        ({"curve": [{"step": 1, "dev_accuracy": "b"}]}, "a result whose 'curve.dev_accuracy' is 'b'"),
    ],
)
def test_a_result_that_no_table_can_use_is_reported_with_its_line(tmp_path, changes, reason):
    append_record(tmp_path / "results.jsonl", run("sgd", 21, 0.6))
    append_record(tmp_path / "results.jsonl", run("sgd", 13, 0.6) | changes)
    results = read_results([tmp_path])
    assert len(results.records) == 1
    assert results.problems == [f"{tmp_path / 'results.jsonl'}:2: {reason}; the line is left out."]


def test_what_a_record_may_leave_open_is_no_fault():
    nested = {"hardware": {"devices": [], "cpu": None}, "data": {}, "arguments": {}, "regime": None}
    curve = [{"step": 1, "train_loss": 0.7}, {"step": 2, "dev_accuracy": None}, {"step": 3, "dev_accuracy": 1}]
    assert find_fault(run("sgd", 13, 1.0, dev_accuracy=0, curve=curve, **nested)) is None
    assert find_fault({"stage": "dev", "hardware": "x"}) is None  # no result: nothing shows it


@pytest.mark.parametrize("name", ["task", "model", "optim", "seed"])
def test_a_result_without_a_needed_field_is_reported_and_other_records_need_none(tmp_path, name):
    record = run("sgd", 13, 0.6)
    del record[name]
    append_record(tmp_path / "results.jsonl", record)
    append_record(tmp_path / "results.jsonl", {"a": 1})
    results = read_results([tmp_path])
    assert [record["a"] for record in results.records] == [1]
    assert results.problems == [f"{tmp_path / 'results.jsonl'}:1: a result with no {name!r}; the line is left out."]


def test_a_missing_file_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"No such file: .*results\.jsonl\. Give a results\.jsonl, or the folder"):
        read_results([tmp_path])


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
