"""The traps on the bare libraries. A test that fails here says that a release has mended one: look at our way out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stock_trainer import HALF, PLAIN, arguments, weights
from tiny_models import TokenRows, tiny_classifier
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HPSearchBackend

pytestmark = pytest.mark.upstream


def bare_trainer(folder, model=None, optimizer=None, callbacks=(), **changes) -> Trainer:
    model = tiny_classifier().double() if model is None else model
    args = arguments(folder, **{"optim": "sgd", "learning_rate": 0.5} | changes)
    optimizers = (optimizer(model.parameters()) if optimizer else None, None)
    trainer = Trainer(
        model=model, args=args, train_dataset=TokenRows(), optimizers=optimizers, callbacks=list(callbacks)
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def update(trainer: Trainer) -> torch.Tensor:
    before = weights(trainer.model).clone()
    trainer.train()
    return weights(trainer.model) - before


def test_1_accumulation_multiplies_the_learning_rate(tmp_path):
    whole = update(bare_trainer(tmp_path, max_steps=1))
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    torch.testing.assert_close(update(bare_trainer(tmp_path, max_steps=1, **split)), 4 * whole, atol=1e-9, rtol=0)


class AtTheStep(TrainerCallback):
    """Keeps the gradient's norm and the optimizer's type as on_pre_optimizer_step sees them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
        self.optimizer = type(optimizer).__name__


def test_6_a_callback_sees_clipped_gradients_and_a_wrapper(tmp_path):
    seen = AtTheStep()
    bare_trainer(tmp_path, callbacks=[seen], max_steps=1, max_grad_norm=1e-3).train()
    assert seen.norm == pytest.approx(1e-3, rel=1e-2)
    assert seen.optimizer == "AcceleratedOptimizer"


@pytest.mark.parametrize("optim_args", ["weight_decay=0.5", "no_such_key=1"])
def test_7_optim_args_are_dropped(tmp_path, optim_args):
    optimizer = bare_trainer(tmp_path, optim_args=optim_args).create_optimizer()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]


def sgd(momentum=0.0, lr=0.5, weight_decay=0.0):
    return lambda parameters: torch.optim.SGD(parameters, lr, momentum=momentum, weight_decay=weight_decay)


@pytest.mark.parametrize(
    ("key", "asked"),
    [("momentum", {"momentum": 0.9}), ("initial_lr", {"lr": 0.1}), ("weight_decay", {"weight_decay": 0.1})],
)
def test_8_a_checkpoints_hyperparameters_win(tmp_path, key, asked):
    bare_trainer(tmp_path, optimizer=sgd(), **HALF).train()
    resumed = bare_trainer(tmp_path, optimizer=sgd(**asked))
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    assert resumed.optimizer.param_groups[0][key] == {"momentum": 0.0, "initial_lr": 0.5, "weight_decay": 0.0}[key]


class Counts(TrainerCallback, ExportableState):
    """Counts steps, and exports the count."""

    def __init__(self):
        self.count = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1

    def state(self):
        return {"args": {}, "attributes": {"count": self.count}}


@pytest.mark.parametrize("restore", [False, True])
def test_9_a_callbacks_state_is_restored_on_demand_alone_and_as_another_object(tmp_path, restore):
    bare_trainer(tmp_path, callbacks=[Counts()], **HALF).train()
    mine = Counts()
    resumed = bare_trainer(tmp_path, callbacks=[mine], restore_callback_states_from_checkpoint=restore)
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    used = next(c for c in resumed.callback_handler.callbacks if isinstance(c, Counts))
    assert used.count == (6 if restore else 3)
    assert (used is mine) is not restore
    saved = TrainerState.load_from_json(f"{tmp_path}/checkpoint-3/trainer_state.json").stateful_callbacks
    assert saved["Counts"]["attributes"]["count"] == 3


def test_10_the_model_card_names_another_optimizer_and_learning_rate(tmp_path):
    trainer = Trainer(
        model=tiny_classifier(),
        args=TrainingArguments(output_dir=str(tmp_path), **PLAIN | {"max_steps": 1}),
        train_dataset=TokenRows(),
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5}),
    )
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "ADAMW_TORCH_FUSED" in card
    assert "learning_rate: 5e-05" in card


def test_11_accelerate_launch_on_a_cpu_starts_one_process_and_says_nothing(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nprint(*[os.environ.get(name) for name in ('WORLD_SIZE', 'MASTER_PORT', "
        "'ACCELERATE_MIXED_PRECISION')], flush=True)\n"
    )
    launcher = str(Path(sys.executable).with_name("accelerate"))
    command = [launcher, "launch", "--cpu", "--num_processes", "2", str(script)]
    environment = {key: value for key, value in os.environ.items() if key not in {"WORLD_SIZE", "MASTER_PORT"}}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=240)
    assert done.stdout.split() == ["None", "29500", "no"]  # one line, so one process; the guard knows it by these


def test_13_timms_sgd_is_nesterovs():
    timm = pytest.importorskip("timm.optim", reason="timm is not installed")
    model = torch.nn.Linear(2, 2)
    defaults = timm.create_optimizer_v2(model, "sgd", lr=0.1).defaults
    assert (defaults["nesterov"], defaults["momentum"]) == (True, 0.9)
    with pytest.raises(ValueError, match="Nesterov momentum requires a momentum"):
        timm.create_optimizer_v2(model, "sgd", lr=0.1, momentum=0.0)


def test_14_bitsandbytes_sgd_needs_momentum():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    with pytest.raises(NotImplementedError, match="without momentum"):
        bitsandbytes.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.0)


def test_15_a_search_sets_existing_fields_alone(tmp_path):
    trainer = bare_trainer(tmp_path, learning_rate=0.5)
    trainer.hp_search_backend = HPSearchBackend.RAY
    trainer._hp_search_setup({"learning_rate": 0.1, "momentum": 0.9})
    assert trainer.args.learning_rate == 0.1
    assert not hasattr(trainer.args, "momentum")


def test_16_batch_norm_sees_micro_batches():
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    gradients = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh())
        for part in x.chunk(parts):
            (model(part).square().mean() / parts).backward()
        gradients.append(model[0].weight.grad)
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm()


def test_more_static_keyword_arguments_ignore_a_searchs_learning_rate(tmp_path):
    trainer = Trainer(
        model=tiny_classifier(),
        args=arguments(tmp_path),
        train_dataset=TokenRows(),
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5}),
    )
    trainer.hp_search_backend = HPSearchBackend.RAY
    trainer._hp_search_setup({"learning_rate": 0.1})
    assert trainer.create_optimizer().param_groups[0]["lr"] == 0.5


def test_more_a_second_train_keeps_the_optimizer(tmp_path):
    trainer = bare_trainer(tmp_path, optimizer=sgd(momentum=0.9), max_steps=1)
    trainer.train()
    first = next(iter(trainer.optimizer.optimizer.state.values()))["momentum_buffer"]
    trainer.train()
    assert next(iter(trainer.optimizer.optimizer.state.values()))["momentum_buffer"] is first


def test_more_a_resume_without_optimizer_state_starts_the_schedule_anew(tmp_path):
    bare_trainer(tmp_path, save_only_model=True, **HALF).train()
    resumed = bare_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    assert (resumed.state.global_step, resumed.lr_scheduler.last_epoch) == (6, 3)
