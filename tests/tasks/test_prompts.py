import json

import pytest

from hf_momentum.errors import UserError
from hf_momentum.tasks.prompts import DEMO_TASKS, PAPER_TASKS, TASKS, Task, get_task

# ---------------------------------------------------------------------------------------------------- tasks as data


def test_the_papers_tasks():
    nli = {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"}
    expected = {
        "sst-2": ("{sentence1} It was <mask>.", {"0": "terrible", "1": "great"}, 128, None),
        "sst-5": (
            "{sentence1} It was <mask>.",
            {"0": "terrible", "1": "bad", "2": "okay", "3": "good", "4": "great"},
            128,
            110,
        ),
        "snli": ("{sentence1:no_last_char}? <mask>, {sentence2:lower_first}", nli, 256, None),
        "trec": (
            "<mask>: {sentence1}",
            {"0": "Description", "1": "Entity", "2": "Expression", "3": "Human", "4": "Location", "5": "Number"},
            128,
            110,
        ),
        "mnli": ("{sentence1:no_last_char}? <mask>, {sentence2:lower_first}", nli, 256, None),
    }
    assert [task.name for task in PAPER_TASKS] == list(expected)
    for task in PAPER_TASKS:
        found = (task.template, task.label_words, task.max_length, task.first_max_length)
        assert found == expected[task.name]
        assert task.pair is (task.name in ("snli", "mnli"))
    assert get_task("snli").labels == ("entailment", "neutral", "contradiction")


def test_the_demos_tasks_have_their_own_names_and_borrowed_prompts():
    assert {task.name for task in DEMO_TASKS}.isdisjoint(task.name for task in PAPER_TASKS)
    two, five, pairs = (get_task(name) for name in ("movie-snippets-2", "movie-snippets-5", "stsb-3"))
    assert (two.template, list(two.label_words.values())) == (TASKS["sst-2"].template, ["terrible", "great"])
    assert two.labels == ("negative", "positive")
    assert list(five.label_words.values()) == list(TASKS["sst-5"].label_words.values())
    assert five.labels == ("very negative", "negative", "neutral", "positive", "very positive")
    assert pairs.label_words == {"different": "No", "related": "Maybe", "equivalent": "Yes"} and pairs.pair


def test_an_unknown_task_names_the_known_ones_and_the_closest():
    with pytest.raises(UserError, match=r"'sst2' \(did you mean 'sst-2'\?\)") as error:
        get_task("sst2")
    assert all(name in str(error.value) for name in TASKS)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{sentence1} It was great.", "<mask> once"),
        ("{sentence1} <mask> <mask>", "<mask> once"),
        ("It was <mask>.", "sentence1} once"),
        ("{sentence1} {sentence2} {sentence2} <mask>", "at most once"),
        ("{text} It was <mask>.", "unknown field {text}"),
        ("{sentence1!r} It was <mask>.", "unknown field"),
        ("{sentence1:lower} It was <mask>.", "unknown modifier 'lower'.*no_last_char, lower_first"),
        ("{sentence1 It was <mask>.", "fields look like"),
    ],
)
def test_a_wrong_template_says_what_is_wrong(template, message):
    with pytest.raises(UserError, match=message):
        Task("mine", template, {"a": "bad", "b": "good"})


def test_task_refuses_lengths_and_words_that_do_not_fit():
    words = {"a": "bad", "b": "good"}
    with pytest.raises(UserError, match=r"max_length.*0"):
        Task("mine", "{sentence1} <mask>", words, max_length=0)
    with pytest.raises(UserError, match=r"first_max_length.*-1"):
        Task("mine", "{sentence1} <mask>", words, first_max_length=-1)
    with pytest.raises(UserError, match="two or more"):
        Task("mine", "{sentence1} <mask>", {"a": "bad"})
    with pytest.raises(UserError, match="'b' has no word"):
        Task("mine", "{sentence1} <mask>", {"a": "bad", "b": None})
    with pytest.raises(UserError, match="template: missing"):
        Task("mine", None, words)


# -------------------------------------------------------------------------------------------------- a user's own task


def test_a_users_own_task_is_read_from_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        'name: mine\ntemplate: "{sentence1}? <mask>, {sentence2}"\n'
        "label_words: {0: No, 1: Yes, 2: off}\nmax_length: 64\nfirst_max_length: 20\n"
    )
    template = "{sentence1}? <mask>, {sentence2}"
    assert get_task(path) == Task("mine", template, {"0": "No", "1": "Yes", "2": "off"}, 64, 20)


def test_a_task_for_a_classifier_needs_no_words(tmp_path):
    path = tmp_path / "plain.yml"
    path.write_text("name: plain\npair: true\nlabel_words:\n  spam:\n  ham:\n")
    task = get_task(str(path))
    assert task.labels == ("spam", "ham") and task.template is None and task.pair


GOOD = {"name": "mine", "template": "{sentence1} <mask>", "label_words": {"a": "bad", "b": "good"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "name: missing"),
        ({"template": None, "label_words": {"a": "", "b": ""}}, "pair: missing; a task without a template"),
        ({"pair": "true"}, "pair: true contradicts the template"),
        ({"pair": "maybe"}, "pair: expected true or false, got 'maybe'"),
        ({"label_words": None}, "label_words: missing"),
        ({"label_words": "good"}, "label_words: expected two or more lines 'label: word'"),
        ({"label_words": ["good", "bad"]}, "label_words: expected"),
        ({"label_words": {"a": ["x"], "b": "y"}}, "label_words: expected"),
        ({"template": ["x"]}, "template: expected a single value"),
        ({"template": "{sentence1}"}, "template: '{sentence1}' must hold <mask> once"),
        ({"max_length": "long"}, "max_length: expected a positive whole number of tokens, got 'long'"),
        ({"first_max_length": "0"}, "first_max_length: expected a positive whole number"),
        ({"max_len": 64}, r"max_len: unknown key \(did you mean 'max_length'\?\); known are name, template"),
    ],
)
def test_a_malformed_task_file_names_the_file_the_key_and_the_form(tmp_path, change, message):
    content = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        get_task(path)
    assert str(path) in str(error.value) and "label_words: {negative: terrible" in str(error.value)


def test_a_task_file_that_is_missing_or_no_mapping(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.yaml.*No such file"):
        get_task(tmp_path / "nothing.yaml")
    for text, message in (("- a\n- b\n", "expected lines 'key: value'"), ("a: [", "while parsing")):
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            get_task(path)
