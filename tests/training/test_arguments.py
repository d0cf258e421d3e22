import dataclasses
import json

import pytest
import torch
from tiny_models import TokenRows, tiny_classifier
from transformers import HfArgumentParser, Trainer
from transformers.training_args import OptimizerNames

from hf_momentum import trainer_kwargs
from hf_momentum.errors import UserError
from hf_momentum.training import FewShotArguments, MomentumTrainingArguments, RecipeTrainingArguments

SGDM = {"optim": "sgdm", "learning_rate": 0.1, "momentum": 0.8, "lr_form": "heavy_ball"}


def ours(tmp_path, **changes) -> MomentumTrainingArguments:
    return MomentumTrainingArguments(output_dir=str(tmp_path), **SGDM | changes)


def fields_of(args: MomentumTrainingArguments) -> dict:
    return {name: getattr(args, name) for name in SGDM}


def test_our_names_stay_plain_strings(tmp_path):
    args = ours(tmp_path)
    assert fields_of(args) == SGDM
    assert type(args.optim) is str


def test_replace_keeps_everything(tmp_path):
    changed = dataclasses.replace(ours(tmp_path), learning_rate=0.2)
    assert fields_of(changed) == SGDM | {"learning_rate": 0.2}


def test_command_line_json_and_dict_round_trip(tmp_path):
    parser = HfArgumentParser(MomentumTrainingArguments)
    argv = f"--output_dir {tmp_path} --optim sgdm --learning_rate 0.1 --momentum 0.8 --lr_form heavy_ball".split()
    assert fields_of(parser.parse_args_into_dataclasses(argv)[0]) == SGDM
    file = tmp_path / "args.json"
    file.write_text(ours(tmp_path).to_json_string())
    stated = json.loads(file.read_text())
    assert {name: stated[name] for name in SGDM} == SGDM
    assert fields_of(parser.parse_dict({"output_dir": str(tmp_path), **SGDM})[0]) == SGDM
    file.write_text(json.dumps({"output_dir": str(tmp_path), **SGDM}))
    assert fields_of(parser.parse_json_file(file)[0]) == SGDM


def test_a_momentum_schedule_round_trips(tmp_path):
    parser, kwargs = HfArgumentParser(MomentumTrainingArguments), {"start": 0.0, "end": 0.9}
    argv = ["--output_dir", str(tmp_path), "--learning_rate", "0.1", "--momentum_schedule", "linear"]
    args = parser.parse_args_into_dataclasses([*argv, "--momentum_schedule_kwargs", json.dumps(kwargs)])[0]
    again = parser.parse_dict(json.loads(args.to_json_string()), allow_extra_keys=True)[0]
    for copied in (args, again, dataclasses.replace(args, learning_rate=0.2)):
        assert (copied.momentum_schedule, copied.momentum_schedule_kwargs) == ("linear", kwargs)
    model = tiny_classifier()
    trainer = Trainer(model=model, args=args, train_dataset=TokenRows(), **trainer_kwargs(model, args))
    assert trainer.create_optimizer().param_groups[0]["momentum_schedule"].startswith("LinearMomentum(start=0.0")


def test_svag_is_allowed(tmp_path):
    args = ours(tmp_path, optim="svag", momentum=None, lr_form=None, ell=2.0)
    assert (args.optim, args.ell, args.learning_rate) == ("svag", 2.0, 0.1)


def test_training_args_bin_round_trip(tmp_path):
    torch.save(ours(tmp_path), tmp_path / "training_args.bin")
    assert fields_of(torch.load(tmp_path / "training_args.bin", weights_only=False)) == SGDM


@pytest.mark.parametrize("name", ["adamw_torch", OptimizerNames.ADAMW_TORCH, "adafactor"])
def test_the_trainers_own_names_work_with_their_default_rate(tmp_path, name):
    args = MomentumTrainingArguments(output_dir=str(tmp_path), optim=name)
    assert type(args.optim) is str
    assert args.learning_rate == 5e-5
    trainer = Trainer(model=tiny_classifier(), args=args, train_dataset=TokenRows())
    assert type(trainer.create_optimizer()).__name__ in {"AdamW", "Adafactor"}


def test_a_stock_trainer_without_our_factory_refuses_our_names(tmp_path):
    trainer = Trainer(model=tiny_classifier(), args=ours(tmp_path), train_dataset=TokenRows())
    with pytest.raises(ValueError, match="unsupported optimizer: sgdm"):
        trainer.create_optimizer()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "sgdn"}, "Unknown optimizer: 'sgdn'. Ours: sgd, sgdm, svag. The Trainer's own: adamw_torch"),
        ({"learning_rate": None}, "sgdm needs a learning rate.*recipes/grids/smoke.yaml"),
        ({"learning_rate": -0.1}, "Invalid learning rate: -0.1"),
        ({"momentum": 1.0}, "Invalid momentum value: 1"),
        ({"momentum": -0.1}, "Invalid momentum value: -0.1"),
        ({"lr_form": "nesterov"}, "Unknown lr_form: 'nesterov'. Allowed: effective, heavy_ball"),
        ({"ell": 2.0}, "ell=2.0: sgdm has none. It belongs to svag"),
        ({"optim": "sgd"}, "momentum=0.8: sgd has none. It belongs to sgdm, svag"),
        ({"optim": "adamw_torch"}, r"momentum=0.8, lr_form=heavy_ball would be ignored by the Trainer's adamw_torch"),
        ({"optim": "svag", "momentum": None}, "svag needs ell"),
        ({"optim": "svag", "momentum": None, "ell": 0.5}, "Invalid ell: 0.5"),
        (
            {"momentum": None, "lr_form": None, "momentum_schedule": "lineal"},
            "schedule 'lineal'. Did you mean 'linear'",
        ),
        ({"momentum": None, "lr_form": None, "momentum_schedule": "linear"}, "'linear' needs start and end"),
        ({"lr_form": None, "momentum_schedule": "constant"}, "momentum=0.8 and momentum_schedule both"),
        ({"momentum_schedule_kwargs": {"end": 0.9}}, "needs a momentum_schedule"),
        ({"momentum_schedule_kwargs": "end=0.9"}, "momentum_schedule_kwargs='end=0.9' is no JSON object"),
        ({"optim_args": "weight_decay=0.1"}, "optim_args='weight_decay=0.1' has no effect on sgdm"),
    ],
)
def test_bad_input_says_what_is_wrong(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        ours(tmp_path, **changes)


def recipe(tmp_path, *argv: str) -> RecipeTrainingArguments:
    parser = HfArgumentParser([FewShotArguments, RecipeTrainingArguments])
    return parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), *argv])[1]


def test_a_recipe_takes_several_optimizers_and_gives_each_its_share(tmp_path):
    args = recipe(tmp_path, "--optim", "sgd", "sgdm", "adamw_torch_fused", "--momentum", "0.8", "--max_steps", "7")
    assert args.optim == ["sgd", "sgdm", "adamw_torch_fused"]
    runs = [args.for_run(name, learning_rate=0.1, seed=13) for name in args.optim]
    assert [run.momentum for run in runs] == [None, 0.8, None]
    assert [(run.optim, run.max_steps, run.seed) for run in runs] == [(name, 7, 13) for name in args.optim]
    assert args.for_run("adamw_torch_fused").learning_rate == 5e-5


def test_a_recipe_gives_a_schedule_to_sgdm_and_ell_to_svag(tmp_path):
    schedule = ["--momentum_schedule", "linear", "--momentum_schedule_kwargs", '{"start": 0.0, "end": 0.9}']
    args = recipe(tmp_path, "--optim", "sgd", "sgdm", "svag", "--ell", "2", *schedule)
    runs = [args.for_run(name, learning_rate=0.1) for name in args.optim]
    assert [run.momentum_schedule for run in runs] == [None, "linear", None]
    assert [run.momentum_schedule_kwargs for run in runs] == [None, {"start": 0.0, "end": 0.9}, None]
    assert [run.ell for run in runs] == [None, None, 2.0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optim", "sgd", "--momentum", "0.9"], "--momentum was given, but none of sgd takes it"),
        (["--optim", "adamw_torch", "--lr_form", "effective"], "--lr_form was given, but none of adamw_torch"),
        (["--optim", "svag", "--ell", "2", "--momentum_schedule", "constant"], "but none of svag takes it"),
        (["--optim", "sgd", "sgd"], "names an optimizer twice"),
        (["--optim", "sgd", "adam"], "Unknown optimizer: 'adam'"),
    ],
)
def test_a_recipe_refuses_what_nobody_would_use(tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        recipe(tmp_path, *argv)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": 0}, "--k must be at least 1"),
        ({"seeds": [13, 13]}, "--seeds names a seed twice"),
        ({"task": ["trec", "trec"]}, "--task names a task twice"),
    ],
)
def test_few_shot_arguments_are_checked(values, message):
    with pytest.raises(UserError, match=message):
        FewShotArguments(**values)
