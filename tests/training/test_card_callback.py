import http.server
import threading
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from tiny_models import TokenRows, tiny_classifier
from transformers import Trainer, TrainingArguments

from hf_momentum import SGDM, MomentumTrainingArguments, trainer_kwargs
from hf_momentum.errors import UserError
from hf_momentum.results.card import results_card
from hf_momentum.training.callbacks import LRMilestonesCallback, ModelCardCallback
from hf_momentum.training.publish import push_with_card

SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def make(folder: Path, *callbacks, optimizers=None, model=None, optim=None, **changes) -> Trainer:
    """A stock Trainer with plain arguments: ours by `trainer_kwargs`, or the classic argument, or its own AdamW."""
    model = model or tiny_classifier()
    args = TrainingArguments(output_dir=str(folder / "out"), **SETTINGS | changes)
    kwargs = trainer_kwargs(model, callbacks=callbacks, **optim) if optim else {"callbacks": list(callbacks)}
    if optimizers is not None:
        kwargs["optimizers"] = optimizers
    return Trainer(model=model, args=args, train_dataset=TokenRows(), eval_dataset=TokenRows(8), **kwargs)


def readme(folder: Path) -> str:
    return (folder / "out" / "README.md").read_text(encoding="utf-8")


class Hub:
    """Takes the place of the Hub: notes what would be uploaded, when it would be."""

    def __init__(self):
        self.uploads = []

    def create_repo(self, name, **kwargs):
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, folder_path, **kwargs):
        self.uploads.append(Path(folder_path, "README.md").read_text(encoding="utf-8"))
        return SimpleNamespace(repo_url="https://hub/me/out", is_done=lambda: True, done=lambda: True)


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    return hub


@pytest.fixture
def refusing_hub(monkeypatch):
    """A server on this machine that answers 401 to everything."""

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(401)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    api = huggingface_hub.HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token="none")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: api)
    yield
    server.shutdown()
    server.server_close()


def test_the_card_names_the_optimizer_and_its_effective_rate(tmp_path):
    card = ModelCardCallback(license="mit", base_model="me/base")
    optim = {"optim": "sgdm", "lr": 0.01, "lr_form": "heavy_ball", "momentum": 0.8, "weight_decay": 0.02}
    trainer = make(tmp_path, card, optim=optim, warmup_steps=1)
    trainer.train()
    text = readme(tmp_path)
    for line in (
        "`sgdm β=0.8`: SGD with momentum as an average of gradients, m ← β m + (1−β) g",
        "Effective learning rate η: 0.05\n",
        "Learning rate form: heavy_ball",
        "Learning rate schedule: linear warmup 1",
        "Weight decay: 0.02",
        "Gradient clipping: at norm 1",
        "Batch size: 4",
        "Steps: 2",
    ):
        assert line in text
    assert not any(word in text.lower() for word in ("adam", "5e-05"))
    data = huggingface_hub.ModelCard(text).data
    assert (data.license, data.base_model) == ("mit", "me/base")
    assert data.tags == ["hf_momentum", "sgdm", "arxiv:2307.15196"]


def test_svag_is_stated_at_eta_and_at_the_rate_of_its_steps(tmp_path):
    optim = {"optim": "svag", "lr": 0.2, "ell": 4, "allow_clipping": True}
    make(tmp_path, ModelCardCallback(), optim=optim, gradient_accumulation_steps=2).train()
    text = readme(tmp_path)
    assert "`svag ℓ=4`" in text
    assert "Effective learning rate η: 0.2\n" in text
    assert "Learning rate of the optimizer: 0.05\n" in text


@pytest.mark.parametrize(
    ("build", "lines"),
    [
        (None, ("`torch.AdamW`", "Learning rate of the optimizer: 5e-05", "betas: (0.9, 0.999)")),
        (
            lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9),
            ("`torch.SGD β=0.9`", "Effective learning rate η: 0.1\n", "Learning rate of the optimizer: 0.01\n"),
        ),
        (
            lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9, nesterov=True),
            ("`torch.SGD β=0.9`", "Learning rate of the optimizer: 0.01\n", "nesterov: True"),
        ),
        (lambda ps: SGDM(ps, lr=0.3, momentum=0.0), ("`sgd`: plain SGD", "Effective learning rate η: 0.3\n")),
    ],
)
def test_any_optimizer_of_any_trainer(tmp_path, build, lines):
    model = tiny_classifier()
    optimizers = None if build is None else (build(model.parameters()), None)
    make(tmp_path, ModelCardCallback(), model=model, optimizers=optimizers).train()
    for line in lines:
        assert line in readme(tmp_path)
    assert ("η:" in readme(tmp_path)) == any("η:" in line for line in lines)


def test_a_scheduler_that_was_given_is_named_and_milestones_are_those_of_the_arguments(tmp_path):
    model = tiny_classifier()
    optimizer = SGDM(model.parameters(), lr=0.3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    make(tmp_path, ModelCardCallback(), model=model, optimizers=(optimizer, scheduler)).train()
    assert "Learning rate schedule: StepLR\n" in readme(tmp_path)

    args = MomentumTrainingArguments(
        output_dir=str(tmp_path / "out"),
        learning_rate=0.1,
        lr_scheduler_type="constant",
        lr_milestones=[0.5],
        **SETTINGS,
    )
    model = tiny_classifier()
    kwargs = trainer_kwargs(model, args, callbacks=[ModelCardCallback()])
    assert any(isinstance(callback, LRMilestonesCallback) for callback in kwargs["callbacks"])
    Trainer(model=model, args=args, train_dataset=TokenRows(), **kwargs).train()
    assert "Learning rate schedule: constant ×0.1 at 0.5\n" in readme(tmp_path)
    assert "Effective learning rate η: 0.1\n" in readme(tmp_path)


def test_a_later_evaluation_is_added(tmp_path):
    trainer = make(tmp_path, ModelCardCallback(), optim={"optim": "sgd", "lr": 0.1})
    trainer.evaluate()
    assert not (tmp_path / "out" / "README.md").exists()
    trainer.train()
    assert "Last evaluation" not in readme(tmp_path)
    loss = trainer.evaluate()["eval_loss"]
    assert f"loss | {loss:.5g} |" in readme(tmp_path)
    assert "after step 2" in readme(tmp_path)
    assert "time |" not in readme(tmp_path)


def test_what_is_pushed_is_this_card(tmp_path, hub):
    card = ModelCardCallback()
    trainer = make(tmp_path, card, optim={"optim": "sgdm", "lr": 0.1}, push_to_hub=True)
    card.attach(trainer)
    trainer.train()
    trainer.push_to_hub(license="mit", tags="mine", finetuned_from="me/base")
    (pushed,) = hub.uploads
    assert pushed == readme(tmp_path)
    assert "`sgdm β=0.9`" in pushed
    data = huggingface_hub.ModelCard(pushed).data
    assert (data.license, data.base_model, data.tags[-1]) == ("mit", "me/base", "mine")


def test_checkpoints_are_pushed_with_it_too(tmp_path, hub):
    card = ModelCardCallback()
    settings = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "save_only_model": True}
    trainer = make(tmp_path, card, optim={"optim": "sgdm", "lr": 0.1}, **settings)
    card.attach(trainer)
    trainer.train()
    assert [("Steps: 1" in text, "sgdm" in text) for text in hub.uploads[:1]] == [(True, True)]


def test_a_card_that_would_be_overwritten_raises_before_anything_is_trained_or_pushed(tmp_path, hub):
    with pytest.raises(UserError, match=r"overwrite this model card.*attach\(trainer\)"):
        make(tmp_path, ModelCardCallback(), optim={"optim": "sgd", "lr": 0.1}, push_to_hub=True).train()
    trainer = make(tmp_path, ModelCardCallback(), optim={"optim": "sgd", "lr": 0.1})
    trainer.train()
    written = readme(tmp_path)
    with pytest.raises(UserError, match="overwrite this model card"):
        trainer.push_to_hub()
    assert (hub.uploads, readme(tmp_path)) == ([], written)


def test_a_readme_that_is_no_card_raises_before_training(tmp_path):
    trainer = make(tmp_path, ModelCardCallback(), optim={"optim": "sgd", "lr": 0.1})
    (tmp_path / "out" / "README.md").write_text("# Mine\n")
    with pytest.raises(UserError, match="is no model card and would be overwritten"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_without_the_callback_the_trainer_pushes_another_story(tmp_path, hub):
    trainer = make(tmp_path, optim={"optim": "sgdm", "lr": 0.1})
    trainer.train()
    trainer.push_to_hub()
    assert "adamw" in hub.uploads[0].lower()  # what all this is for


def test_what_has_no_place_and_an_untrained_model_raise(tmp_path, hub):
    card = ModelCardCallback()
    trainer = make(tmp_path, optim={"optim": "sgd", "lr": 0.1})
    card.attach(trainer)
    with pytest.raises(UserError, match="has not trained yet"):
        trainer.push_to_hub()
    trainer.train()
    with pytest.raises(UserError, match="dataset_tags has no place"):
        trainer.push_to_hub(dataset_tags="glue")


def test_a_refused_push_leaves_model_and_card_and_says_so(tmp_path, refusing_hub):
    trainer = make(tmp_path, optim={"optim": "sgd", "lr": 0.1})
    record = {
        "task": "t",
        "model": "m",
        "seed": 0,
        "optim": "sgd",
        "learning_rate": 0.1,
        "test_accuracy": 0.5,
        "stage": "test",
    }
    said = push_with_card(trainer, results_card([record], "mine"))
    assert said.startswith("Not pushed (")
    assert "401" in said
    assert str(tmp_path / "out") in said
    assert "# mine" in readme(tmp_path)
    assert (tmp_path / "out" / "model.safetensors").exists()
