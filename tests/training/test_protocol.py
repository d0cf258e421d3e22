import pytest

from hf_momentum.errors import UserError
from hf_momentum.training import RecipeTrainingArguments
from hf_momentum.training.grid import Grid, read_grid
from hf_momentum.training.protocol import (
    optimizer_fields,
    plan_groups,
    refuse_prompts_under_fsdp,
    without_clipping_beside_svag,
)


def grid_file(tmp_path, text: str) -> str:
    file = tmp_path / "grid.yaml"
    file.write_text(text)
    return str(file)


def recipe(tmp_path, **changes) -> RecipeTrainingArguments:
    return RecipeTrainingArguments(output_dir=str(tmp_path), **changes)


def test_a_grid_file_is_read_with_numbers_as_numbers(tmp_path):
    text = "learning_rate: [1e-4, 0.01]\nper_device_train_batch_size: [2, 4]\ndefaults: {max_steps: 5}"
    grid = read_grid(grid_file(tmp_path, text))
    assert grid == Grid([1e-4, 0.01], [2, 4], None, {"max_steps": 5})
    assert grid.swept == {"learning_rate", "per_device_train_batch_size"}


@pytest.mark.parametrize("name", ["smoke", "paper"])
def test_the_shipped_grids_can_be_read(name, pytestconfig):
    grid = read_grid(str(pytestconfig.rootpath / "recipes" / "grids" / f"{name}.yaml"))
    assert "learning_rate" in grid.swept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: [1]", "unknown key 'lr'. Allowed: optim, learning_rate, per_device_train_batch_size, defaults"),
        ("learning_rate: 0.1", r"learning_rate must be a list such as \[1, 2\] of float, not 0.1"),
        ("learning_rate: []", "learning_rate must be a list"),
        ("learning_rate: [fast]", r"of float, not \['fast'\]"),
        ("learning_rate: {sgd: 1}", "learning_rate of sgd must be a list"),
        ("per_device_train_batch_size: [x]", "of int"),
        ("defaults: [1]", "defaults must hold lines"),
        ("defaults: {learning_rate: 1}", r"learning_rate does not belong under defaults: list it.*learning_rate: .1."),
        ("defaults: {seed: 1}", "seed does not belong under defaults: use --seeds"),
        ("- 1", "must hold lines 'key: value', not list"),
        ("a: b: c", "Cannot read"),
    ],
)
def test_a_bad_grid_names_file_and_fault(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        read_grid(grid_file(tmp_path, text))
    assert "grid.yaml" in str(error.value)


def test_a_missing_grid_is_named(tmp_path):
    with pytest.raises(UserError, match=r"Cannot read .*none.yaml: .*No such file"):
        read_grid(str(tmp_path / "none.yaml"))


def test_every_optimizer_gets_every_cell(tmp_path):
    grid = Grid([0.1, 0.2], [4, 8])
    training = recipe(tmp_path, optim=["sgd", "sgdm"], gradient_accumulation_steps=3)
    groups = plan_groups(training, grid, {"task": "t"}, 13, "draw")
    cells = [
        [(r.arguments.optim, r.arguments.learning_rate, r.settings["batch_size"]) for r in g.runs] for g in groups
    ]
    rates_and_sizes = [(0.1, 12), (0.1, 24), (0.2, 12), (0.2, 24)]
    assert cells == [[(optim, *cell) for cell in rates_and_sizes] for optim in ("sgd", "sgdm")]
    assert {run.arguments.seed for group in groups for run in group.runs} == {13}


def test_rates_may_differ_by_optimizer(tmp_path):
    grid = Grid({"sgd": [0.1], "adamw_torch": [1e-5, 1e-4]}, None)
    groups = plan_groups(recipe(tmp_path, optim=["sgd", "adamw_torch"]), grid, {}, 13, "draw")
    assert [[run.arguments.learning_rate for run in group.runs] for group in groups] == [[0.1], [1e-5, 1e-4]]
    with pytest.raises(UserError, match="but not for sgdm"):
        plan_groups(recipe(tmp_path, optim=["sgdm"]), grid, {}, 13, "draw")


def test_heavy_ball_rates_keep_sgd_at_the_same_effective_rate(tmp_path):
    training = recipe(tmp_path, optim=["sgd", "sgdm"], lr_form="heavy_ball", momentum=0.8, learning_rate=0.1)
    fields = [optimizer_fields(group.runs[0].arguments) for group in plan_groups(training, Grid(), {}, 13, "draw")]
    assert [f["effective_lr"] for f in fields] == pytest.approx([0.5, 0.5])
    assert [f["lr_form"] for f in fields] == ["effective", "heavy_ball"]
    assert [f["momentum"] for f in fields] == [0.0, 0.8]


def test_an_optimizer_of_the_trainers_own_has_no_effective_rate(tmp_path):
    group = plan_groups(recipe(tmp_path, optim=["adamw_torch"]), Grid(), {}, 13, "draw")[0]
    fields = optimizer_fields(group.runs[0].arguments)
    assert (fields["learning_rate"], fields["effective_lr"], fields["momentum"]) == (5e-5, None, None)


def names(tmp_path, seed=13, common=None, grid=None, **changes):
    group = plan_groups(
        recipe(tmp_path, **{"optim": ["sgd"]} | changes), grid or Grid([0.1]), common or {}, seed, str(seed)
    )[0]
    return group.runs[0].run_id, group.group_id, group.row_id


def test_names_depend_on_what_matters_and_on_nothing_else(tmp_path):
    run, group, row = names(tmp_path)
    assert names(tmp_path) == (run, group, row)
    assert names(tmp_path / "elsewhere", disable_tqdm=True, logging_steps=7) == (run, group, row)
    for changes in ({"max_steps": 7}, {"weight_decay": 0.1}, {"optim": ["sgdm"]}, {"common": {"data": "x", "k": 1}}):
        assert names(tmp_path, **changes)[0] != run
        assert names(tmp_path, **changes)[2] != row
    other_seed = names(tmp_path, seed=21)
    assert other_seed[0] != run
    assert other_seed[2] == row
    wider = names(tmp_path, grid=Grid([0.1, 0.2]))
    assert wider[0] == run
    assert wider[1] != group
    assert wider[2] != row


def test_the_best_on_dev_is_picked_and_of_equals_the_first(tmp_path):
    group = plan_groups(recipe(tmp_path, optim=["sgd"]), Grid([0.1, 0.2, 0.3]), {}, 13, "draw")[0]
    records = [{"run_id": run.run_id, "dev_accuracy": a} for run, a in zip(group.runs, [0.5, 0.8, 0.8], strict=True)]
    assert group.pick([{"run_id": "other", "dev_accuracy": 1.0}, *reversed(records)]) is group.runs[1]


def test_spelling_out_a_default_is_the_same_run(tmp_path):
    spelled = names(tmp_path, optim=["sgdm"], momentum=0.9, lr_form="effective")
    assert spelled == names(tmp_path, optim=["sgdm"])


def test_a_batch_size_below_one_is_refused(tmp_path):
    with pytest.raises(UserError, match="per_device_train_batch_size must be at least 1, not 0"):
        names(tmp_path, grid=Grid([0.1], [0]))


def test_svag_stretches_the_steps_and_keeps_the_rate_and_the_batch(tmp_path):
    training = recipe(tmp_path, optim=["sgd", "svag"], ell=2.0, max_steps=10, max_grad_norm=0.0)
    sgd, svag = (group.runs[0] for group in plan_groups(training, Grid([0.1]), {}, 13, "draw"))
    assert (svag.arguments.max_steps, svag.arguments.gradient_accumulation_steps) == (20, 2)
    assert svag.arguments.learning_rate == sgd.arguments.learning_rate == 0.1
    assert svag.settings["batch_size"] == sgd.settings["batch_size"] == 8
    assert (svag.settings["ell"], svag.settings["momentum"]) == (2.0, 0.0)


def test_clipping_is_off_for_all_rows_beside_svag(tmp_path):
    training = recipe(tmp_path, optim=["sgd", "svag"], ell=2.0)
    without_clipping_beside_svag(training, explicit=False)
    assert training.max_grad_norm == 0.0
    alone = recipe(tmp_path, optim=["sgd"])
    without_clipping_beside_svag(alone, explicit=False)
    assert alone.max_grad_norm == 1.0
    with pytest.raises(UserError, match=r"max_grad_norm=0\.5 beside svag"):
        without_clipping_beside_svag(recipe(tmp_path, optim=["svag"], ell=2.0, max_grad_norm=0.5), explicit=True)
    without_clipping_beside_svag(recipe(tmp_path, optim=["svag"], ell=2.0, max_grad_norm=0.0), explicit=True)


def test_prompts_under_fsdp_are_refused(tmp_path, monkeypatch):
    arguments = recipe(tmp_path)
    refuse_prompts_under_fsdp(arguments, "prompt")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refuse_prompts_under_fsdp(arguments, "classifier")
    with pytest.raises(UserError, match=r"deepspeed_zero3\.yaml"):
        refuse_prompts_under_fsdp(arguments, "prompt")
