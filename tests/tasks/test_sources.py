"""Task data from folders, from LM-BFF's k-shot files and from the Hub (local folders stand in for the Hub's)."""

import dataclasses
import json
from collections import Counter

import pytest

from hf_momentum.errors import UserError
from hf_momentum.tasks import hub, sources
from hf_momentum.tasks.folders import list_kshot_splits, load_kshot_split
from hf_momentum.tasks.sources import load_fewshot, load_task_data

BINARY = ("0", "1")
NLI = ("entailment", "neutral", "contradiction")
TREC = tuple("012345")


def write_jsonl(file, records):
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def single(text, label):
    return {"sentence1": text, "label": label}


def pair_of(first, second, label):
    return {"sentence1": first, "sentence2": second, "label": label}


@pytest.fixture
def folder(tmp_path):
    write_jsonl(tmp_path / "sst-2/train.jsonl", [single("good", "1"), "", single("bad", 0)])
    write_jsonl(tmp_path / "sst-2/test.jsonl", [{**single("fine", "1"), "sentence2": "x", "idx": 3}])
    return tmp_path


# A folder of JSON lines


def test_folder_with_task(folder):
    data = load_task_data("sst-2", BINARY, pair=False, data_dir=folder)
    assert data.train == [single("good", "1"), single("bad", "0")]
    assert data.test == [single("fine", "1")]
    assert (data.name, data.labels, data.dev, data.mapping_note) == ("sst-2", BINARY, None, None)
    assert str(folder / "sst-2") in data.source


def test_folder_is_the_task(folder):
    assert load_task_data("mine", BINARY, pair=False, data_dir=folder / "sst-2").train[0] == single("good", "1")


def test_folder_of_pairs(tmp_path):
    for name in ("train", "test"):
        write_jsonl(tmp_path / f"SNLI/{name}.jsonl", [pair_of("p\u2028q", "h", "neutral")])
    data = load_task_data("snli", NLI, pair=True, data_dir=str(tmp_path))
    assert data.train == [pair_of("p\u2028q", "h", "neutral")]


def test_line_separators_inside_a_sentence_do_not_end_the_line(folder):
    line = '{"sentence1": "a\u2028b\u0085c", "label": "1"}'
    write_jsonl(folder / "sst-2/train.jsonl", [line])
    assert load_task_data("sst-2", BINARY, pair=False, data_dir=folder).train == [single("a\u2028b\u0085c", "1")]


def test_byte_order_mark_and_crlf(folder):
    (folder / "sst-2/train.jsonl").write_bytes(b'\xef\xbb\xbf{"sentence1": "a", "label": "1"}\r\n')
    assert load_task_data("sst-2", BINARY, pair=False, data_dir=folder).train == [single("a", "1")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"sentence1": "a", ', "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"sentence1": "a"}', "no label (found: sentence1)"),
        ('{"text": "a"}', "no sentence1 and no label (found: text)"),
        ('{"sentence1": 3, "label": "1"}', "sentence1 is 3, not a string"),
        ('{"sentence1": " ", "label": "1"}', "sentence1 is empty"),
        ('{"sentence1": "a", "label": "great"}', "unknown label 'great'. Allowed labels: 0, 1."),
        ('{"sentence1": "a", "label": true}', "unknown label True"),
        ('{"sentence1": "a", "label": null}', "unknown label None"),
    ],
)
def test_malformed_line_names_file_line_and_form(folder, line, message):
    write_jsonl(folder / "sst-2/train.jsonl", [single("good", "1"), line])
    with pytest.raises(UserError) as error:
        load_task_data("sst-2", BINARY, pair=False, data_dir=folder)
    assert str(error.value).startswith(f"{folder / 'sst-2/train.jsonl'}, line 2: {message}")
    assert "Allowed labels" in str(error.value) or '{"sentence1": "…", "label": "0"}' in str(error.value)


def test_missing_sentence2_of_a_pair(folder):
    with pytest.raises(
        UserError, match=r'line 1: no sentence2 .*Expected: {"sentence1": "…", "sentence2": "…", "label"'
    ):
        load_task_data("sst-2", BINARY, pair=True, data_dir=folder)


def test_empty_split(folder):
    write_jsonl(folder / "sst-2/test.jsonl", [])
    with pytest.raises(UserError, match=r"sst-2/test\.jsonl holds no example"):
        load_task_data("sst-2", BINARY, pair=False, data_dir=folder)


def test_one_file_missing(folder):
    (folder / "sst-2/test.jsonl").unlink()
    with pytest.raises(UserError, match=r"sst-2 holds train\.jsonl but no test\.jsonl"):
        load_task_data("sst-2", BINARY, pair=False, data_dir=folder)


def test_empty_folder_lists_what_was_looked_for(tmp_path):
    with pytest.raises(UserError) as error:
        load_task_data("sst-2", BINARY, pair=False, data_dir=tmp_path)
    for part in ("No data for sst-2", "sst-2/train.jsonl", "train.jsonl", "K-SEED", "It is empty", '{"sentence1"'):
        assert part in str(error.value)


def test_folder_of_other_things_lists_them(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"It holds: notes\.txt"):
        load_task_data("sst-2", BINARY, pair=False, data_dir=tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        load_task_data("sst-2", BINARY, pair=False, data_dir=tmp_path / "nowhere")


def test_not_utf8(folder):
    (folder / "sst-2/train.jsonl").write_bytes(b'{"sentence1": "caf\xe9", "label": "1"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl is not UTF-8"):
        load_task_data("sst-2", BINARY, pair=False, data_dir=folder)


def test_unknown_task_and_two_sources(tmp_path):
    with pytest.raises(UserError, match=r"No data is known for task 'mine'.*sst-2.*movie-snippets-2"):
        load_task_data("mine", BINARY, pair=False)
    with pytest.raises(UserError, match="not both"):
        load_task_data("mine", BINARY, pair=False, data_dir=tmp_path, hub_id="a/b")


# LM-BFF's k-shot folders

SNLI_HEADER = "index\tcaptionID\tpairID\tb1\tb2\tp1\tp2\tsentence1\tsentence2\tlabel1\tgold_label"


@pytest.fixture
def kshot(tmp_path):
    for seed in (13, 42):
        sst = tmp_path / f"k-shot/SST-2/16-{seed}"
        sst.mkdir(parents=True)
        for name in ("train", "dev", "test"):
            (sst / f"{name}.tsv").write_text(f'sentence\tlabel\n"a {name} {seed}\t1\nbad\t0\n', encoding="utf-8")
    nli = tmp_path / "k-shot/MNLI/16-42"
    nli.mkdir(parents=True)
    for name in ("train", "dev_matched", "test_matched", "test_mismatched"):
        row = f"0\tc\tp\tx\tx\tx\tx\tfirst {name}\tsecond\tneutral\tcontradiction"
        (nli / f"{name}.tsv").write_text(f"{SNLI_HEADER}\n{row}\n", encoding="utf-8")
    trec = tmp_path / "k-shot/trec/16-42"
    trec.mkdir(parents=True)
    for name in ("train", "dev", "test"):
        (trec / f"{name}.csv").write_text(f'0,"What is ""{name}"" , then ?"\n5,How many ?\n', encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("inside", ["", "k-shot", "k-shot/SST-2"])
def test_kshot_folders_are_found(kshot, inside):
    assert list_kshot_splits("sst-2", kshot / inside) == [(16, 13), (16, 42)]


def test_kshot_tsv_with_one_sentence(kshot):
    split = load_kshot_split("sst-2", BINARY, 16, 13, kshot, pair=False)
    assert split.train == [single('"a train 13', "1"), single("bad", "0")]
    assert split.dev[0] == single('"a dev 13', "1") and split.test[0] == single('"a test 13', "1")
    assert split.source.endswith("SST-2/16-13")


def test_kshot_tsv_lines_end_at_line_feeds_only(kshot):
    (kshot / "k-shot/SST-2/16-13/train.tsv").write_bytes(b"sentence\tlabel\r\na\rb\t1\r\n")
    assert load_kshot_split("sst-2", BINARY, 16, 13, kshot, pair=False).train == [single("a\rb", "1")]


def test_kshot_glue_tsv_takes_the_last_column_and_the_matched_test(kshot):
    split = load_kshot_split("mnli", NLI, 16, 42, kshot, pair=True)
    assert split.train == [pair_of("first train", "second", "contradiction")]
    assert split.dev == [pair_of("first dev_matched", "second", "contradiction")]
    assert split.test == [pair_of("first test_matched", "second", "contradiction")]


def test_kshot_csv(kshot):
    split = load_kshot_split("trec", TREC, 16, 42, kshot, pair=False)
    assert split.train == [single('What is "train" , then ?', "0"), single("How many ?", "5")]


def test_kshot_through_load_fewshot(kshot):
    splits = load_fewshot("sst-2", BINARY, 16, (13, 42), pair=False, data_dir=kshot)
    assert [splits[seed].dev[0]["sentence1"] for seed in (13, 42)] == ['"a dev 13', '"a dev 42']


def test_kshot_errors(kshot):
    with pytest.raises(UserError, match=r"no k-shot split 512-13 \(K-SEED\) of sst-2; there: 16-13, 16-42"):
        load_fewshot("sst-2", BINARY, 512, (13,), pair=False, data_dir=kshot)
    with pytest.raises(UserError, match="must be among 16-13, 16-42"):
        load_task_data("sst-2", BINARY, pair=False, data_dir=kshot)
    folder = kshot / "k-shot/SST-2/16-13"
    (folder / "dev.tsv").unlink()
    with pytest.raises(UserError, match=r"no dev split. Looked for: dev.tsv, dev.csv, dev_matched.tsv"):
        load_kshot_split("sst-2", BINARY, 16, 13, kshot, pair=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sentence\tlabel\nfine\t1\nshort\n", "train.tsv, line 3: 1 tab-separated fields where the header has 2"),
        ("sentence\tlabel\nfine\tneutral\n", "train.tsv, line 2: unknown label 'neutral'. Allowed labels: 0, 1"),
        ("text\tlabel\nfine\t1\n", "train.tsv, line 1: no column sentence in the header"),
        ("sentence\tlabel\n", "train.tsv holds no example"),
        ("", "train.tsv, line 1: no column sentence"),
    ],
)
def test_kshot_malformed_tsv(kshot, content, message):
    (kshot / "k-shot/SST-2/16-13/train.tsv").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_kshot_split("sst-2", BINARY, 16, 13, kshot, pair=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0,a\n1,b,c\n", r"train.csv, line 2: 3 comma-separated fields, expected label,sentence1 \(no header\)"),
        ('0,"open\n', "train.csv is not a UTF-8 CSV file"),
        ("label,text\n", "train.csv, line 1: unknown label 'label'"),
    ],
)
def test_kshot_malformed_csv(kshot, content, message):
    (kshot / "k-shot/trec/16-42/train.csv").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_kshot_split("trec", TREC, 16, 42, kshot, pair=False)


# k-shot splits drawn from everything else


def test_load_fewshot_draws_each_seed_and_caps_the_test(tmp_path):
    train = [single(f"t{i}", str(i % 2)) for i in range(100)]
    write_jsonl(tmp_path / "train.jsonl", train)
    write_jsonl(tmp_path / "test.jsonl", [single(f"x{i}", "0") for i in range(1200)])
    splits = load_fewshot("sst-2", BINARY, 4, (13, 21), pair=False, data_dir=tmp_path)
    assert list(splits) == [13, 21]
    assert [len(splits[13].train), len(splits[13].dev), len(splits[13].test)] == [8, 8, 1000]
    assert splits[13].train != splits[21].train and splits[13].test == splits[21].test


# The Hub


@pytest.fixture
def local_hub(tmp_path, monkeypatch):
    """Make `local_hub(task, files)` write a data set and stand it in for the task's Hub id."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def write(task, splits, class_names=None, directory="."):
        home = tmp_path / "hub" / directory
        home.mkdir(parents=True, exist_ok=True)
        for name, rows in splits.items():
            if class_names:
                split = datasets.Dataset.from_list(rows)
                split = split.cast_column("label", datasets.ClassLabel(names=class_names))
                split.to_parquet(home / f"{name}-00000-of-00001.parquet")
            else:
                write_jsonl(home / f"{name}.jsonl", rows)
        if task:
            source = dataclasses.replace(hub.HUB_SOURCES[task], path=str(tmp_path / "hub"), config=None)
            monkeypatch.setitem(hub.HUB_SOURCES, task, source)
        return tmp_path / "hub"

    return write


def nli_rows(*rows):
    return [{"premise": first, "hypothesis": second, "label": label} for first, second, label in rows]


def test_hub_snli_by_class_name_without_unlabelled_rows(local_hub):
    """The stand-in's class order differs from the task's, so a mapping by number would fail."""
    train = nli_rows(("p1", "h1", 0), ("p2", "h2", -1), ("p3", "h3", 2), ("p4", "", 1))
    splits = {"train": train, "validation": nli_rows(("v", "w", 1)), "test": nli_rows(("t", "u", 0))}
    local_hub("snli", splits, class_names=["contradiction", "entailment", "neutral"])
    data = load_task_data("snli", NLI, pair=True)
    assert data.train == [pair_of("p1", "h1", "contradiction"), pair_of("p3", "h3", "neutral")]
    assert data.test == [pair_of("v", "w", "entailment")]
    assert "train is split train, 2 rows, 2 unlabelled or empty dropped" in data.mapping_note
    assert "test is split validation, 1 rows, 0" in data.mapping_note


def trec_row(text, name):
    return {"text": text, "label": 7, "label_text": "x", "label_coarse": 0, "label_coarse_original": name}


def test_hub_trec_by_name_beside_files_that_are_no_data(local_hub):
    names = ["DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM"]
    rows = [trec_row(f"q{i} ?", name) for i, name in enumerate(names)]
    home = local_hub("trec", {"train": rows, "test": rows[:1]})
    for name in ("train_5500.label", "TREC_10.label", "prepare.py", "question_types.txt"):
        (home / name).write_text("DESC:manner How ?\n")
    data = load_task_data("trec", TREC, pair=False)
    assert data.train == [single(f"q{i} ?", str(i)) for i in range(6)]
    assert "DESC → 0, ENTY → 1, ABBR → 2, HUM → 3, LOC → 4, NUM → 5" in data.mapping_note


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("sst-2", ["negative", "positive"]),
        ("sst-5", ["very negative", "negative", "neutral", "positive", "very positive"]),
    ],
)
def test_hub_sst_by_label_text(local_hub, task, names):
    rows = [{"text": f"s{i}", "label": 9, "label_text": name} for i, name in enumerate(names)]
    local_hub(task, {"train": rows, "validation": rows[:1], "test": rows[1:2]})
    data = load_task_data(task, tuple(str(i) for i in range(len(names))), pair=False)
    assert data.train == [single(f"s{i}", str(i)) for i in range(len(names))]
    assert data.test == [single("s0", "0")] if task == "sst-2" else [single("s1", "1")]


def test_hub_mnli_tests_on_validation_matched(local_hub):
    splits = {name: nli_rows((name, "h", 0)) for name in ("train", "validation_matched", "validation_mismatched")}
    splits["test_matched"] = nli_rows(("unlabelled", "h", -1))
    config = "".join(f"      - split: {name}\n        path: {name}-*.parquet\n" for name in splits)
    home = local_hub("mnli", splits, class_names=list(NLI))
    (home / "README.md").write_text(f"---\nconfigs:\n  - config_name: default\n    data_files:\n{config}---\n")
    assert load_task_data("mnli", NLI, pair=True).test == [pair_of("validation_matched", "h", "entailment")]


def test_own_task_on_the_hub(local_hub):
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    home = local_hub(None, {"train": rows, "test": rows[:1]}, class_names=["ham", "spam"])
    data = load_task_data("mail", ("ham", "spam"), pair=False, hub_id=str(home))
    assert data.train == [single("a", "spam"), single("b", "ham")]


def test_own_pairs_on_the_hub_and_an_unlabelled_test_split(local_hub):
    rows = [pair_of("a", "b", 0), pair_of("c", "d", 1)]
    splits = {"train": rows, "test": [pair_of("e", "f", -1)], "validation": rows[1:]}
    home = local_hub(None, splits)
    data = load_task_data("mine", BINARY, pair=True, hub_id=str(home))
    assert data.test == [pair_of("c", "d", "1")]
    assert "test is split validation" in data.mapping_note


def test_hub_refuses_numbers_for_a_task_known_by_name(local_hub):
    rows = [{"text": "a", "label": 1}]
    home = local_hub(None, {"train": rows, "test": rows})
    with pytest.raises(UserError, match=r"split train: unknown label name '1' in column label. Known: DESC, ENTY"):
        load_task_data("trec", TREC, pair=False, hub_id=str(home))


def test_hub_wrong_columns(local_hub):
    home = local_hub(None, {"train": [{"body": "a", "label": 1}], "test": [{"body": "a", "label": 1}]})
    with pytest.raises(
        UserError, match=r"expected the columns sentence1, label or sentence, label or text, label; found: "
    ):
        load_task_data("mine", BINARY, pair=False, hub_id=str(home))


def test_hub_without_a_labelled_test_split(local_hub):
    home = local_hub(None, {"train": [{"text": "a", "label": 1}]})
    with pytest.raises(
        UserError, match=r"no labelled row to test on. Looked for split test or validation; it has: train"
    ):
        load_task_data("mine", BINARY, pair=False, hub_id=str(home))


def test_hub_that_cannot_be_loaded(tmp_path):
    with pytest.raises(UserError, match=r"'.*nowhere' \(configuration default\) cannot be loaded: .* --data_dir"):
        load_task_data("mine", BINARY, pair=False, hub_id=f"{tmp_path}/nowhere")


def test_hub_ids_have_owners_and_known_labels():
    assert set(hub.HUB_SOURCES) == set(hub.LABEL_NAMES) == {"sst-2", "sst-5", "trec", "snli", "mnli"}
    assert all(source.path.count("/") == 1 for source in hub.HUB_SOURCES.values())
    assert set(hub.LABEL_NAMES["trec"].values()) == set(TREC)


def test_hub_id_with_a_configuration(monkeypatch):
    seen = []
    monkeypatch.setattr(hub, "_load_dataset", lambda source: seen.append(source) or {})
    for hub_id in ("a/b:c", "a/b", "nyu-mll/glue:mnli"):
        with pytest.raises(UserError, match="no labelled row to train on"):
            sources.load_task_data("mine", BINARY, pair=False, hub_id=hub_id)
    assert seen == [hub.HubSource("a/b", "c"), hub.HubSource("a/b"), hub.HUB_SOURCES["mnli"]]


# Real data


@pytest.mark.data
@pytest.mark.parametrize(
    ("task", "labels", "pair", "train", "test"),
    [
        ("sst-2", BINARY, False, (3305, 3605), (428, 444)),
        ("sst-5", tuple("01234"), False, (1090, 2214, 1623, 2318, 1287), (279, 633, 389, 510, 399)),
        ("trec", TREC, False, (1148, 1245, 84, 1215, 823, 856), (138, 94, 9, 65, 81, 113)),
        ("snli", NLI, True, (2981, 2994, 3024), (346, 328, 326)),
        ("mnli", NLI, True, (3061, 2980, 2958), (347, 333, 320)),
    ],
)
def test_real_data(data_dir, task, labels, pair, train, test):
    data = load_task_data(task, labels, pair=pair, data_dir=data_dir)
    for part, expected in ((data.train, train), (data.test, test)):
        found = Counter(example["label"] for example in part)
        assert tuple(found[label] for label in labels) == expected
