"""TrainingArguments that know momentum, ℓ and the learning rate's form."""

import json
from dataclasses import dataclass, field, fields

import torch
from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_momentum.errors import UserError
from hf_momentum.optim import MOMENTUM_SCHEDULES, get_optimizer_info, list_optimizers
from hf_momentum.training.callbacks.fused_backward import check_fused_backward, check_takes_fused_backward
from hf_momentum.training.callbacks.lr_milestones import check_milestones
from hf_momentum.training.callbacks.momentum_schedule import get_schedule
from hf_momentum.training.optimizers import build_optimizer

TRAINER_DEFAULT_LR = 5e-5
LR_FORMS = ("effective", "heavy_ball")
_OUR_FIELDS = ("momentum", "ell", "lr_form", "momentum_schedule", "momentum_schedule_kwargs", "fused_backward")


def is_our_optimizer(name: str) -> bool:
    """Whether `name` is one of this package's optimizers rather than one of the Trainer's own.

    Args:
        name: The optimizer's name. `sgd` is ours.

    Returns:
        True for `sgd`, `sgdm` and `svag`.
    """
    return name in list_optimizers()


def check_optimizer_name(name: str | OptimizerNames) -> str:
    """Turn an optimizer's name into a plain string, or say which names there are.

    Args:
        name: A name, or the Trainer's enum member.

    Returns:
        The name as a plain string.

    Raises:
        UserError: If neither this package nor the Trainer knows the name.
    """
    name = str(name.value if isinstance(name, OptimizerNames) else name)
    trainer_names = [member.value for member in OptimizerNames]
    if not is_our_optimizer(name) and name not in trainer_names:
        raise UserError(
            f"Unknown optimizer: {name!r}. Ours: {', '.join(list_optimizers())}. "
            f"The Trainer's own: {', '.join(trainer_names)}."
        )
    return name


@dataclass
class MomentumTrainingArguments(TrainingArguments):
    """TrainingArguments in which `optim` also takes `sgd`, `sgdm` and `svag`, with their hyperparameters as fields.

    The fields are read by `trainer_kwargs`; without it the Trainer refuses `sgdm` and `svag` by itself.

    Attributes:
        optim: One of ours (`sgd`, `sgdm`, `svag`) or any of the Trainer's own names.
        learning_rate: η of Eq. 3 of the paper, or γ of Eq. 1 under `lr_form="heavy_ball"`. Ours have no default.
        lr_form: `effective` (η, the default) or `heavy_ball` (γ; the optimizer then runs at η = γ/(1−β)).
        momentum: β of `sgdm` (default 0.9) and `svag` (default 0).
        ell: ℓ of `svag`, a real number of at least 1; the learning rate stays η, training runs at η/ℓ.
        momentum_schedule: Name of a schedule of β for `sgdm`, in place of `momentum`.
        momentum_schedule_kwargs: Its keywords, as a dict or JSON text.
        fused_backward: Whether `sgd` steps during the backward pass, see `FusedBackwardCallback`.
        lr_milestones: Fractions of the training at which the learning rate is multiplied by `lr_decay`, with any
            optimizer; for `lr_scheduler_type` constant or constant_with_warmup.
        lr_decay: The factor.
    """

    optim: str = field(
        default="sgdm",
        metadata={
            "help": "sgd, sgdm or svag, or any optimizer of the Trainer (such as adamw_torch_fused) as a baseline."
        },
    )
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate. For sgd, sgdm and svag: the effective one, η of m ← βm + (1−β)g, x ← x − ηm; "
            "it has no default. For the Trainer's own optimizers: 5e-5 unless given."
        },
    )
    lr_form: str | None = field(
        default=None,
        metadata={
            "help": "effective (the default): --learning_rate is η. heavy_ball: it is γ of torch's SGD, m ← βm + g, "
            "x ← x − γm, and η = γ/(1−β).",
            "choices": list(LR_FORMS),
        },
    )
    momentum: float | None = field(
        default=None, metadata={"help": "β, in [0, 1). sgdm: 0.9 unless given; svag: 0 unless given; sgd takes none."}
    )
    ell: float | None = field(
        default=None, metadata={"help": "ℓ ≥ 1 of svag: noise covariance × ℓ at learning rate η/ℓ."}
    )
    momentum_schedule: str | None = field(
        default=None,
        metadata={"help": "β over the steps of sgdm, in place of --momentum.", "choices": list(MOMENTUM_SCHEDULES)},
    )
    momentum_schedule_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": """Keywords of --momentum_schedule as JSON, such as '{"start": 0.5, "end": 0.9}'."""},
    )
    fused_backward: bool = field(
        default=False,
        metadata={
            "help": "sgd: update each parameter during the backward pass, as soon as its gradient is there, and free "
            "the gradient. For one process without accumulation; needs --max_grad_norm 0."
        },
    )
    lr_milestones: list[float] | None = field(
        default=None,
        metadata={
            "help": "Fractions of the training at which the learning rate is multiplied by --lr_decay, such as 0.5 "
            "0.75; for --lr_scheduler_type constant or constant_with_warmup."
        },
    )
    lr_decay: float = field(default=0.1, metadata={"help": "The factor at each of --lr_milestones."})

    def __post_init__(self):
        self.momentum_schedule_kwargs = _parsed(self.momentum_schedule_kwargs)
        name = check_optimizer_name(self.optim)
        if is_our_optimizer(name):
            self._check_ours(name)
            self.optim = OptimizerNames.SGD.value  # a name that the parent knows, for its own checks only
        else:
            self._check_foreign(name)
        super().__post_init__()
        self.optim = name
        if self.fused_backward:
            check_fused_backward(self)
        if self.lr_milestones:
            check_milestones(self.lr_milestones, self.lr_decay, SchedulerType(self.lr_scheduler_type).value)

    def _check_ours(self, name: str) -> None:
        if self.optim_args:
            raise UserError(
                f"optim_args={self.optim_args!r} has no effect on {name}. Use --momentum, --ell and --weight_decay."
            )
        if self.lr_form not in {None, *LR_FORMS}:
            raise UserError(f"Unknown lr_form: {self.lr_form!r}. Allowed: {', '.join(LR_FORMS)}.")
        for key in ("momentum", "ell"):
            if getattr(self, key) is not None and key not in get_optimizer_info(name).hyperparameters:
                takers = [taker for taker in list_optimizers() if key in get_optimizer_info(taker).hyperparameters]
                raise UserError(f"{key}={getattr(self, key)}: {name} has none. It belongs to {', '.join(takers)}.")
        if self.fused_backward:
            check_takes_fused_backward(name)
        if self.learning_rate is None:
            raise UserError(
                f"{name} needs a learning rate: SGD's lies far above the Trainer's default of 5e-5. Give "
                "--learning_rate (0.01 and 0.1 are common first tries), or a grid of them with --grid, such as "
                "recipes/grids/smoke.yaml or recipes/grids/paper.yaml."
            )
        settings = {"lr_form": self.lr_form or LR_FORMS[0], "momentum": self.momentum, "ell": self.ell}
        if self.momentum_schedule is not None:
            settings["momentum_schedule"] = get_schedule(self.momentum_schedule, self.momentum_schedule_kwargs)
        elif self.momentum_schedule_kwargs:
            raise UserError("momentum_schedule_kwargs needs a momentum_schedule. Name the schedule too.")
        build_optimizer([torch.zeros(1, requires_grad=True)], optim=name, lr=self.learning_rate, **settings)

    def _was_given(self, key: str) -> bool:
        return getattr(self, key) is not None and getattr(self, key) is not False

    def _check_foreign(self, name: str) -> None:
        given = [f"{key}={getattr(self, key)}" for key in _OUR_FIELDS if self._was_given(key)]
        if given:
            raise UserError(
                f"{', '.join(given)} would be ignored by the Trainer's {name}. "
                f"They belong to {', '.join(list_optimizers())}: choose one of these with --optim."
            )
        if self.learning_rate is None:
            self.learning_rate = TRAINER_DEFAULT_LR


def _parsed(kwargs: dict | str | None) -> dict | None:
    if not isinstance(kwargs, str):
        return kwargs
    try:
        parsed = json.loads(kwargs)
        if not isinstance(parsed, dict):
            raise ValueError
    except ValueError:
        raise UserError(f'momentum_schedule_kwargs={kwargs!r} is no JSON object such as {{"end": 0.9}}.') from None
    return parsed


@dataclass
class RecipeTrainingArguments(MomentumTrainingArguments):
    """The same for a recipe's command line, where `--optim` takes several names and a grid may supply learning rates.

    `for_run` turns it into the `MomentumTrainingArguments` of one run.
    """

    optim: list[str] = field(
        default_factory=lambda: ["sgdm"],
        metadata={
            "help": "One or more of sgd, sgdm and svag, or any optimizer name of the Trainer (such as "
            "adamw_torch_fused) as a baseline; each becomes a row of the table."
        },
    )

    def __post_init__(self):
        names = [self.optim] if isinstance(self.optim, str) else list(self.optim)
        names = [check_optimizer_name(name) for name in names]
        if len(set(names)) < len(names):
            raise UserError(f"--optim names an optimizer twice: {' '.join(names)}. Name each once.")
        ours = [name for name in names if is_our_optimizer(name)]
        self.optim = ours[0] if ours else names[0]
        for key in _OUR_FIELDS:
            if self._was_given(key) and not any(self._takes(name, key) for name in names):
                raise UserError(f"--{key} was given, but none of {', '.join(names)} takes it.")
        super().__post_init__()
        self.optim = names

    @staticmethod
    def _takes(name: str, key: str) -> bool:
        if key in ("momentum_schedule", "momentum_schedule_kwargs"):
            return name == "sgdm"
        if key == "fused_backward":
            return name == "sgd"
        return is_our_optimizer(name) and (key == "lr_form" or key in get_optimizer_info(name).hyperparameters)

    def _check_ours(self, name: str) -> None:
        """Leave the hyperparameters to the runs: each optimizer takes its own share of them."""

    def _check_foreign(self, name: str) -> None:
        """Leave the learning rate to the runs as well."""

    def for_run(self, optim: str, **changes) -> MomentumTrainingArguments:
        """The arguments of one run with one optimizer; hyperparameters that it does not take are left out.

        Args:
            optim: The run's optimizer.
            **changes: Other fields of TrainingArguments to set.

        Returns:
            Checked arguments.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        values |= {f.name: f.default for f in fields(self) if f.name in _OUR_FIELDS and not self._takes(optim, f.name)}
        return MomentumTrainingArguments(**values | {"optim": optim} | changes)


@dataclass
class FewShotArguments:
    """What the few-shot protocol adds to the Trainer's arguments.

    Attributes:
        model: A Hub id, a local folder, or `demo`.
        task: Names of tasks, or YAML files of the user's own.
        data_dir: A folder with the tasks' data, instead of the Hub.
        hub_id: A data set on the Hub for a task of the user's own.
        k: Examples per class, for training and again for choosing.
        seeds: One draw, one initialisation and one data order per seed.
        tuning: `prompt` (label words at the mask) or `classifier` (a new head).
        peft: `lora` trains low-rank adapters only.
        grid: YAML file of learning rates × batch sizes (× optimizers).
        config: YAML file of any of these arguments.
        zero_shot: Whether the untrained model gets a row, where prompts allow it.
        model_card: Whether the results are written as a Hub model card; `push_to_hub` does so too.
    """

    _argument_group_name = "few-shot protocol"

    model: str | None = field(default=None, metadata={"help": "Hub id, local folder, or demo (the embedded encoder)."})
    task: list[str] | None = field(
        default=None,
        metadata={"help": "One or more of sst-2 sst-5 snli trec mnli, the demo's own, or YAML files of your tasks."},
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with TASK/{train,test}.jsonl, or LM-BFF's TASK/K-SEED folders."}
    )
    hub_id: str | None = field(
        default=None, metadata={"help": "Hub data set, owner/name[:config], for your own task."}
    )
    k: int = field(default=16, metadata={"help": "Examples per class for training, and as many for choosing."})
    seeds: list[int] = field(
        default_factory=lambda: [13, 21, 42, 87, 100], metadata={"help": "Each draws, initialises and orders anew."}
    )
    tuning: str = field(
        default="prompt",
        metadata={
            "help": "prompt: label words at the mask. classifier: a new head.",
            "choices": ["prompt", "classifier"],
        },
    )
    peft: str | None = field(default=None, metadata={"help": "lora: train adapters only.", "choices": ["lora"]})
    grid: str | None = field(
        default=None,
        metadata={"help": "YAML file of learning rates × batch sizes; the best on dev, per seed, is tested."},
    )
    config: str | None = field(default=None, metadata={"help": "YAML file of arguments; the command line wins."})
    zero_shot: bool = field(default=True, metadata={"help": "Add the untrained model's row under prompt tuning."})
    model_card: bool = field(
        default=False, metadata={"help": "Write the results as a Hub model card into --output_dir; --push_to_hub too."}
    )

    def __post_init__(self):
        if self.k < 1:
            raise UserError(f"--k must be at least 1, not {self.k}.")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"--seeds names a seed twice: {self.seeds}.")
        if self.task and len(set(self.task)) < len(self.task):
            raise UserError(f"--task names a task twice: {' '.join(self.task)}.")
