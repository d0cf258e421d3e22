import pytest
import torch
from tiny_models import TokenRows, tiny_classifier
from transformers import Trainer, TrainerControl, TrainerState

from hf_momentum import MomentumTrainingArguments, trainer_kwargs
from hf_momentum.errors import UserError
from hf_momentum.training.callbacks import BestWeightsCallback
from hf_momentum.training.callbacks.best_weights import copy_into, trained_state


def evaluate(callback, model, step, value, name="eval_accuracy"):
    state = TrainerState(global_step=step)
    callback.on_evaluate(None, state, TrainerControl(), model=model, metrics={name: value})


def started() -> BestWeightsCallback:
    callback = BestWeightsCallback()
    callback.on_train_begin(None, None, None)
    return callback


def test_the_first_of_equals_comes_back():
    model, callback = torch.nn.Linear(2, 1), started()
    for step, value in enumerate([0.5, 0.7, 0.7, 0.6]):
        torch.nn.init.constant_(model.weight, float(step))
        evaluate(callback, model, step, value)
    torch.nn.init.constant_(model.weight, 9.0)
    callback.on_train_end(None, None, None, model=model)
    assert model.weight.tolist() == [[1.0, 1.0]]
    assert (callback.best_value, callback.best_step) == (0.7, 1)


def test_buffers_come_back_and_frozen_weights_are_not_copied():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model[0].requires_grad_(False)
    assert set(trained_state(model)) == {
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }
    callback = started()
    evaluate(callback, model, 1, 0.5)
    model(torch.randn(4, 2))
    assert model[1].num_batches_tracked == 1
    callback.on_train_end(None, None, None, model=model)
    assert model[1].num_batches_tracked == 0


def test_an_evaluation_outside_training_is_left_alone():
    callback = BestWeightsCallback()
    evaluate(callback, torch.nn.Linear(1, 1), 0, 1.0)
    assert callback.best_value is None


def test_a_missing_metric_is_an_error():
    with pytest.raises(UserError, match=r"No metric 'eval_accuracy' in this evaluation; there are \['eval_loss'\]"):
        evaluate(started(), torch.nn.Linear(1, 1), 0, 1.0, name="eval_loss")


def test_weights_of_another_model_are_refused():
    with pytest.raises(UserError, match="of another model"):
        copy_into(torch.nn.Linear(1, 1), trained_state(torch.nn.Linear(1, 1, bias=False)))


def test_in_a_stock_trainer_the_best_evaluation_stands_at_the_end(tmp_path):
    args = MomentumTrainingArguments(
        output_dir=str(tmp_path),
        optim="sgd",
        learning_rate=1.0,
        max_steps=8,
        eval_strategy="steps",
        eval_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    model, seen = tiny_classifier(), []

    def metrics(_):
        seen.append({name: tensor.detach().clone() for name, tensor in trained_state(model).items()})
        return {"accuracy": [0.1, 0.5, 0.3, 0.9, 0.9, 0.2, 0.1, 0.0][len(seen) - 1]}

    rows = TokenRows()
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=metrics,
        **trainer_kwargs(model, args, callbacks=[BestWeightsCallback()]),
    )
    trainer.train()
    for name, tensor in trained_state(model).items():
        assert torch.equal(tensor, seen[3][name])
    assert any(not torch.equal(seen[7][name], seen[3][name]) for name in seen[3])
