"""What an image recipe adds to the Trainer's arguments."""

from dataclasses import dataclass, field

from hf_momentum.errors import UserError

NORMS = ("batch", "group")


@dataclass
class ImageArguments:
    """The model, the images and the runs of an image recipe.

    Attributes:
        preset: A named set of defaults; everything else on the command line wins over it.
        model: A timm model's name.
        norm: `batch` or `group` replaces the normalisation of a model that lets one choose; None is its own.
        pretrained: Whether to start from timm's weights.
        data_dir: A folder with the images, instead of the Hub.
        hub_id: A data set on the Hub.
        seeds: One initialisation, one data order and one augmentation per seed.
        ells: ℓ of SVAG; 1 is the plain optimizer.
        global_batch_size: Images per gradient, over all processes and accumulation steps; under SVAG of each half.
        micro_batch: The most images that a device takes at once.
        grid: YAML file of learning rates (× optimizers).
        config: YAML file of any of these arguments.
        model_card: Whether the results are written as a Hub model card.
    """

    _argument_group_name = "images"

    preset: str | None = field(default=None, metadata={"help": "A named set of defaults, see above."})
    model: str | None = field(default=None, metadata={"help": "A timm model's name."})
    norm: str | None = field(
        default=None,
        metadata={"help": "Normalisation, where the model lets one choose; its own unless given.", "choices": NORMS},
    )
    pretrained: bool = field(default=False, metadata={"help": "Start from timm's pretrained weights."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with {train,test}.parquet, or an ImageFolder's train/ and test/."}
    )
    hub_id: str | None = field(default=None, metadata={"help": "Hub data set, owner/name."})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Each initialises, orders and augments anew."}
    )
    ells: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "ℓ of SVAG, several values for the figure of ℓ; 1 is the plain optimizer."},
    )
    global_batch_size: list[int] = field(
        default_factory=lambda: [512],
        metadata={"help": "Images per gradient over all processes and accumulation steps; several for a grid."},
    )
    micro_batch: int | None = field(
        default=None, metadata={"help": "The most images that a device takes at once; the rest is accumulated."}
    )
    grid: str | None = field(default=None, metadata={"help": "YAML file of learning rates (× optimizers)."})
    config: str | None = field(default=None, metadata={"help": "YAML file of arguments; the command line wins."})
    model_card: bool = field(
        default=False, metadata={"help": "Write the results as a Hub model card into --output_dir."}
    )

    def __post_init__(self):
        for name in ("seeds", "ells", "global_batch_size"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"--{name} needs values, each once, not {values}.")
        if min(self.ells) < 1:
            raise UserError(f"--ells must be at least 1, not {min(self.ells):g}; 1 is the plain optimizer.")
