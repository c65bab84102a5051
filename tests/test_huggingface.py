"""The Hugging Face loss and callback, with a real Trainer and a tiny model made on the spot."""

import pytest
import torch
from torch import nn

import proxy_losses as P

from .absent import import_without

pytest.importorskip("transformers", reason="needs proxy-losses[huggingface]")
accelerate = pytest.importorskip("accelerate", reason="needs proxy-losses[huggingface]")
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from proxy_losses.integrations.huggingface import (  # noqa: E402
    LossScheduleCallback,
    make_compute_loss,
)

pytestmark = [
    # The frameworks' own use of what torch or Python deprecate.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]
ROWS, BATCH = 48, 8  # six steps in an epoch
PAD = -100


def new_model(labels=2, cls=BertForSequenceClassification, dropout=0.0):
    torch.manual_seed(0)
    return cls(
        BertConfig(
            vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8, max_position_embeddings=8, num_labels=labels,
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )
    )  # fmt: skip


def data(rows=ROWS, tokens=False):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 16, (rows, 5), generator=g)
    labels = (ids > 12).long() if tokens else (ids[:, 0] > 10).long()
    if tokens:
        labels[:, 3:] = PAD
    return [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]


def bce(logits, targets):
    return nn.functional.binary_cross_entropy_with_logits(logits[:, 0], targets.float())


def new_loss(unit="steps", warmup_loss=bce, num_classes=1):
    size = 1 if unit == "epochs" else 4
    mode = {f"warmup_{unit}": size, f"blend_{unit}": size}
    return P.LossWarmupWrapper(
        warmup_loss, P.SmoothAPLoss(num_classes, queue_size=24, temperature=0.3), temp_start=0.5,
        temp_end=0.05, temp_decay_steps=9, **mode,
    )  # fmt: skip


class Seen(TrainerCallback):
    """What other callbacks are told."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


def new_trainer(loss_fn, folder, *callbacks, model=None, rows=None, schedule=None, **kwargs):
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", learning_rate=0.01,
        disable_tqdm=True,
        **{"num_train_epochs": 3, "logging_steps": 1, "save_strategy": "no",
           "per_device_train_batch_size": BATCH, **kwargs},
    )  # fmt: skip
    return Trainer(
        model or new_model(), args, train_dataset=rows or data(), eval_dataset=rows or data(),
        compute_loss_func=make_compute_loss(loss_fn),
        callbacks=[schedule or LossScheduleCallback(loss_fn), *callbacks],
    )  # fmt: skip


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def assert_equal_states(one, two):
    one, two = one.state_dict(), two.state_dict()
    assert one.keys() == two.keys()
    for name, x in one.items():
        assert torch.equal(x, two[name]) if isinstance(x, torch.Tensor) else x == two[name], name


@pytest.mark.parametrize("unit", ["epochs", "steps"])
def test_it_drives_and_logs(tmp_path, unit):
    loss_fn, seen = new_loss(unit), Seen()
    trainer = new_trainer(loss_fn, tmp_path, seen)
    trainer.train()
    rows = [r for r in trainer.state.log_history if "loss" in r]
    weights = [r["loss_schedule/main_weight"] for r in rows]
    if unit == "steps":
        assert weights == [float(P.blend_weight(s, P.Schedule(4, 4))) for s in range(18)]
    else:
        assert weights == [0] * 6 + [0.5] * 6 + [1] * 6
    phases = [r["loss_schedule/phase"] for r in rows]
    assert phases == sorted(phases)
    assert set(phases) == {0, 1, 2}
    switch = {"epochs": 6, "steps": 4}[unit]
    temps = [r["loss_schedule/temperature"] for r in rows]
    want = [float(P.temp_at(s, P.Schedule(switch, 4, 0.5, 0.05, 9))) for s in range(switch, 18)]
    assert temps[switch:] == pytest.approx(want)
    assert [r["loss_schedule/phase"] for r in seen.logs if "loss" in r] == phases
    assert int(loss_fn.main_loss._queue.state.enqueued) > 0


def test_logging_can_be_off_or_renamed(tmp_path):
    for schedule, name in (({"log": False}, None), ({"prefix": "a/"}, "a/main_weight")):
        loss_fn = new_loss()
        trainer = new_trainer(
            loss_fn, tmp_path, schedule=LossScheduleCallback(loss_fn, **schedule), max_steps=1
        )
        trainer.train()
        names = {k for row in trainer.state.log_history for k in row if "main_weight" in k}
        assert names == ({name} if name else set())


@pytest.mark.parametrize("unit", ["epochs", "steps"])
# Mid-warmup, at the end of an epoch, mid-blend, mid-decay.
@pytest.mark.parametrize("stop", [2, 6, 8, 13])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path, unit, stop):
    saves = {"save_strategy": "steps", "save_steps": stop, "save_total_limit": None}
    first = new_loss(unit)
    first.reset_queue_each_epoch = True
    whole = new_trainer(first, tmp_path, **saves)
    whole.train()
    second = new_loss(unit)
    second.reset_queue_each_epoch = True
    resumed = new_trainer(second, tmp_path, **saves)
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{stop}")
    assert len(losses(whole)) == 18
    assert losses(resumed) == losses(whole)
    assert_equal_states(resumed.model, whole.model)
    assert_equal_states(second, first)


def test_a_checkpoint_elsewhere_is_found_or_named(tmp_path):
    whole = new_loss()
    trainer = new_trainer(whole, tmp_path / "a", max_steps=6, save_strategy="steps", save_steps=3)
    trainer.train()
    checkpoint = tmp_path / "a" / "checkpoint-3"
    lost = new_loss()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-3.*resume_from"):
        new_trainer(lost, tmp_path / "b", max_steps=6).train(resume_from_checkpoint=str(checkpoint))
    found = new_loss()
    schedule = LossScheduleCallback(found, resume_from=checkpoint)
    again = new_trainer(found, tmp_path / "b", schedule=schedule, max_steps=6)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert_equal_states(found, whole)


def test_a_loss_without_wrapper_is_refused():
    with pytest.raises(ValueError, match="no LossWarmupWrapper in SmoothAPLoss"):
        LossScheduleCallback(P.SmoothAPLoss(1))


def test_evaluation_does_not_write_the_queue(tmp_path):
    plain, evaluated = new_loss(), new_loss()
    one = new_trainer(plain, tmp_path)
    one.train()
    two = new_trainer(evaluated, tmp_path, eval_strategy="steps", eval_steps=1)
    two.train()
    assert losses(one) == losses(two)
    assert_equal_states(plain, evaluated)
    assert evaluated.training
    assert sum("eval_loss" in row for row in two.state.log_history) == 18


def test_accumulated_cross_entropy_is_that_of_the_whole_batch(tmp_path):
    """The last micro-batch of an epoch is smaller; the clock counts optimizer steps."""
    found = []
    for batch, pieces in ((24, 1), (8, 3)):
        loss_fn = new_loss(warmup_loss=nn.CrossEntropyLoss(), num_classes=2)
        trainer = new_trainer(
            loss_fn, tmp_path, rows=data(44), per_device_train_batch_size=batch,
            gradient_accumulation_steps=pieces, max_steps=4,
        )  # fmt: skip
        trainer.train()
        assert loss_fn._global_step == 3
        found.append((losses(trainer), trainer.model.state_dict()))
    (one, first), (two, second) = found
    # float32 that sums in another order, fed back over four steps of Adam.
    assert one == pytest.approx(two, rel=1e-4)
    for name, x in first.items():
        torch.testing.assert_close(second[name], x, rtol=1e-3, atol=1e-4)


def test_token_classification(tmp_path):
    loss_fn = new_loss(warmup_loss=nn.CrossEntropyLoss(), num_classes=3)
    model = new_model(3, BertForTokenClassification)
    trainer = new_trainer(loss_fn, tmp_path, model=model, rows=data(tokens=True))
    trainer.train()
    assert len(losses(trainer)) == 18
    # 12 steps of the main phase: 8 rows of 3 labelled tokens each; padding takes no slot.
    state = loss_fn.main_loss._queue.state
    assert not (state.targets == PAD).any()


def test_bfloat16(tmp_path):
    loss_fn = new_loss()
    trainer = new_trainer(loss_fn, tmp_path, bf16=True)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(x)) for x in losses(trainer))


def test_without_transformers_the_extra_is_named(monkeypatch):
    with pytest.raises(ImportError, match=r"\.\[huggingface\]"):
        import_without(monkeypatch, "huggingface", "transformers")


def test_a_plain_loop_with_accelerate(tmp_path):
    """The model is prepared, the loss is not; it is registered, so that it is saved and loaded."""

    def train(steps, load=None):
        torch.manual_seed(0)
        accelerator = accelerate.Accelerator(cpu=True)
        model, loss_fn = nn.Linear(4, 1), new_loss()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        loss_fn = loss_fn.to(accelerator.device)
        accelerator.register_for_checkpointing(loss_fn)
        if load:
            accelerator.load_state(str(load))
        seen = []
        for step in steps:
            loss_fn.on_train_batch_start(step)
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            loss = loss_fn(model(x), (x[:, 0] > 0.4).long())
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            seen.append(loss.item())
            if step == 6:
                accelerator.save_state(str(tmp_path / "state"))
        return seen, loss_fn

    whole, first = train(range(14))
    resumed, second = train(range(7, 14), tmp_path / "state")
    assert resumed == whole[7:]
    assert_equal_states(second, first)
