"""SVAG in a plain Accelerate loop, and the example of one."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from svag_loop import accelerator, applied_gradients, prepared, rows
from torch.utils.data import IterableDataset, TensorDataset

from hf_momentum.errors import UserError
from hf_momentum.optim import svag_coefficients
from hf_momentum.training.accelerate import SVAG

RECIPE = Path(__file__).parents[2] / "recipes" / "accelerate_loop.py"


@pytest.mark.parametrize("ell", [1, 2.5, 4])
@pytest.mark.parametrize("n", [1, 2])
def test_the_applied_gradient(n, ell):
    x, loop = rows(16), accelerator(2 * n)
    gradients = applied_gradients(loop, SVAG(ell, loop), *prepared(loop, TensorDataset(x)), epochs=2)
    r1, r2 = svag_coefficients(ell)
    halves = x.reshape(-1, 2, 2 * n, 3).mean(dim=2)  # of every step, the mean of each half
    expected = r1 * halves[:, 0] + r2 * halves[:, 1]
    torch.testing.assert_close(torch.stack(gradients), expected.repeat(2, 1), atol=1e-14, rtol=0)


def test_steps_run_on_into_the_next_epoch():
    x, loop = rows(6), accelerator(2, across_epochs=True)  # three batches an epoch, two to a step
    gradients = applied_gradients(loop, SVAG(4, loop), *prepared(loop, TensorDataset(x)), epochs=2)
    r1, r2 = svag_coefficients(4)
    halves = torch.cat([x, x]).reshape(3, 2, 2, 3).mean(dim=2)
    torch.testing.assert_close(torch.stack(gradients), r1 * halves[:, 0] + r2 * halves[:, 1], atol=1e-14, rtol=0)


def test_a_short_group_is_refused_before_the_epoch():
    loop = accelerator(4)
    with pytest.raises(
        UserError, match=r"6 micro-batches, 4 to a step, .* would have 2\. .*sync_with_dataloader=False"
    ):
        applied_gradients(loop, SVAG(4, loop), *prepared(loop, TensorDataset(rows(12))))


class Stream(IterableDataset):
    def __iter__(self):
        return ((row,) for row in rows(12))


def test_a_short_group_of_unknown_length_is_refused_when_it_comes():
    loop = accelerator(4)
    with pytest.raises(UserError, match="weighs 4 micro-batches per step, but Accelerate ended the step at number 2"):
        applied_gradients(loop, SVAG(4, loop), *prepared(loop, Stream()))


def test_outside_of_accumulate_it_refuses():
    loop = accelerator(2)
    loop.sync_gradients = True
    with pytest.raises(UserError, match=r"Call weigh\(\) once per micro-batch, in accelerator.accumulate\(\)"):
        SVAG(4, loop).weigh(torch.ones(()))


@pytest.mark.parametrize(("steps", "ell", "message"), [(3, 4, "must be even. Use 6"), (2, 0.5, "Invalid ell: 0.5")])
def test_what_is_refused_at_once(steps, ell, message):
    with pytest.raises(UserError, match=message):
        SVAG(ell, accelerator(steps))


def test_a_checkpoint_resumes_at_a_step_and_with_its_own_ell(tmp_path):
    loop = accelerator(4)
    svag = SVAG(4, loop)
    loop.register_for_checkpointing(svag)
    model, loader = prepared(loop, TensorDataset(rows(16)))
    whole = applied_gradients(loop, svag, model, loader)
    loop.save_state(tmp_path / "state")
    with loop.accumulate(model):
        svag.weigh(torch.ones(()))  # interrupted within a step
    loop.load_state(tmp_path / "state")
    resumed = applied_gradients(loop, svag, model, loader, skip=4)
    torch.testing.assert_close(resumed, whole[1:], atol=0, rtol=0)
    svag.ell = 8
    with pytest.raises(UserError, match="trained with ell=4, not 8"):
        loop.load_state(tmp_path / "state")


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("accelerate_loop", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--optim sgd", "sgd: 100 steps, test accuracy"),
        ("--optim sgdm", "sgdm: 100 steps, test accuracy"),
        ("--optim svag --ell 2", "svag: 200 steps, test accuracy"),
    ],
)
def test_the_example_loop_learns(main, options, line, capsys):
    main([*options.split(), "--steps", "100"])
    printed, accuracy = capsys.readouterr().out.rsplit(maxsplit=1)
    assert printed == line
    assert float(accuracy) > 0.8


def test_the_example_loop_refuses_an_ell_without_use(main, capsys):
    with pytest.raises(SystemExit):
        main(["--optim", "sgd", "--ell", "4"])
    assert "--optim svag and --ell need each other" in capsys.readouterr().err


def test_the_example_is_short():
    assert len(RECIPE.read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize("clipping", ["auto", 1.0])
def test_clipping_by_deepspeed_raises(clipping):
    plugin = SimpleNamespace(deepspeed_config={"gradient_clipping": clipping})
    accelerator = SimpleNamespace(gradient_accumulation_steps=2, state=SimpleNamespace(deepspeed_plugin=plugin))
    with pytest.raises(UserError, match=f"DeepSpeed would clip gradients .gradient_clipping: {clipping!r}"):
        SVAG(2.0, accelerator)
    plugin.deepspeed_config["gradient_clipping"] = 0.0
    assert SVAG(2.0, accelerator).ell == 2.0
