"""Whether a model's loss is normalised over the accumulated batch, and the mending where it is not (trap 1).

The Trainer takes the loss for normalised by `num_items_in_batch` as soon as a model's `forward` takes `**kwargs`, and
then leaves out the division by the accumulation steps. Heads that compute a plain mean (those of RoBERTa, BERT,
DistilBERT and others) take `**kwargs` without using them, which multiplies the gradient by the accumulation steps and
by the number of processes. Adam's scale invariance hides it; under SGD the learning rate is several times too large.
"""

import ast
import inspect
import textwrap

from torch import nn


def base_model_of(model: nn.Module) -> nn.Module:
    """The model that the Trainer asks for its loss: inside `torch.compile` and a PEFT wrapper, or the model itself.

    Args:
        model: Any module.

    Returns:
        The unwrapped module.
    """
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def honours_num_items_in_batch(model: nn.Module) -> bool:
    """Whether a model's loss is `sum / num_items_in_batch` when the Trainer passes that number.

    Read off the source of `forward`: it names `num_items_in_batch`, or hands its own `**kwargs` to
    `self.loss_function`, as the causal language models of transformers do.

    Args:
        model: A model, possibly inside a PEFT wrapper.

    Returns:
        False for a plain mean, and also where the source cannot be read.
    """
    forward = inspect.unwrap(type(base_model_of(model)).forward)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    return any(_uses_num_items(node) for node in ast.walk(tree))


def _uses_num_items(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "loss_function":
        return any(keyword.arg is None for keyword in node.keywords)
    return "num_items_in_batch" in {
        getattr(node, "arg", None),
        getattr(node, "id", None),
        getattr(node, "value", None),
    }


def normalise_loss_per_micro_batch(model: nn.Module) -> bool:
    """Tell the Trainer to divide this model's loss by the accumulation steps, where the model's own loss is a mean.

    Sets `accepts_loss_kwargs = False` on the base model. Call it before the Trainer is built: the Trainer reads the
    attribute in its constructor, from the model inside a PEFT wrapper. A value that somebody set is kept.

    Args:
        model: The model to be trained.

    Returns:
        Whether the attribute was set here.
    """
    base = base_model_of(model)
    if hasattr(base, "accepts_loss_kwargs") or honours_num_items_in_batch(base):
        return False
    base.accepts_loss_kwargs = False
    return True


def trainer_misreads_loss(model: nn.Module) -> bool:
    """Whether the Trainer's constructor takes this model's loss for normalised by `num_items_in_batch` when it is not.

    Args:
        model: The model as the Trainer gets it.

    Returns:
        False also where somebody set `accepts_loss_kwargs`, who is taken to know.
    """
    base = base_model_of(model)
    if hasattr(base, "accepts_loss_kwargs"):
        return False
    parameters = inspect.signature(base.forward).parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return takes_any and not honours_num_items_in_batch(base)
