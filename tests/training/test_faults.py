"""What may go wrong in a run is named, and the last good checkpoint stays."""

from __future__ import annotations

import io
import resource
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import CaptureFixture

from moezoo.errors import CorruptFile, NonFiniteLoss, ResumeMismatch, SaveError, TrainingError
from moezoo.training.checkpoints import checkpoints
from moezoo.training.loop import StepRecord, TrainingState, fit, start
from moezoo.training.recipes import TrainingRecipe
from moezoo.training.run import run_training
from moezoo.training.watch import Watch, advice, row
from tests.training.runs import SETTINGS, STEPS, differences, measurements, noisy_model, train
from tests.training.test_loop import batches
from tests.training.text import small_model

PLAIN = TrainingRecipe()


def fitted(model: torch.nn.Module, **options: object) -> list[StepRecord]:
    return fit(start(model, PLAIN, steps=2), batches(), PLAIN, steps=2, **options)


def spoil_output(model: torch.nn.Module) -> str:
    model.decoder.blocks[1].mlp.experts.register_forward_hook(lambda m, i, o: o * float("nan"))
    return "output of decoder.blocks.1.mlp.experts"


def spoil_weight(model: torch.nn.Module) -> str:
    with torch.no_grad():
        model.encoder.blocks[0].mlp.wo.weight[0, 0] = float("inf")
    return "weight encoder.blocks.0.mlp.wo.weight"


def spoil_gradient(model: torch.nn.Module) -> str:
    model.encoder.blocks[0].attention.q.weight.register_hook(lambda g: g * float("inf"))
    return "gradient of encoder.blocks.0.attention.q.weight"


def spoil_one_number(model: torch.nn.Module) -> str:
    def spoilt(grad: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(grad.shape[1]) == 1, float("nan"), grad)

    model.encoder.blocks[0].attention.k.weight.register_hook(spoilt)
    return "gradient of encoder.blocks.0.attention.k.weight"


@pytest.mark.parametrize("spoil", [spoil_output, spoil_weight, spoil_gradient, spoil_one_number])
def test_what_is_not_finite_is_named_with_its_step(
    spoil: Callable[[torch.nn.Module], str],
) -> None:
    model = small_model()
    place = spoil(model)
    with pytest.raises(NonFiniteLoss, match="step 1") as caught:
        fitted(model)
    assert caught.value.key == place
    records = fitted(model, nonfinite="skip")
    assert [(r.skipped, r.culprit) for r in records] == [(True, place)] * 2
    assert place in advice(records, 4)["skipped"]


def test_skipping_ends_after_a_hundred_steps_in_a_row() -> None:
    model = small_model()
    spoil_output(model)
    state = start(model, PLAIN, steps=200)
    one = batches(1)(0)
    with pytest.raises(NonFiniteLoss, match="in a row"):
        fit(state, lambda step: one, PLAIN, steps=200, nonfinite="skip")
    assert state.step == 100


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    good = train(tmp_path, until=8).state.step

    def spoil(record: StepRecord) -> None:
        with torch.no_grad():
            model.shared.weight[3, 3] = float("nan")

    model = noisy_model()
    with pytest.raises(NonFiniteLoss, match=r"step 9: weight shared\.weight"):
        run_training(model, batches(), SETTINGS, tmp_path, steps=STEPS, save_every=1, on_step=spoil)
    assert checkpoints(tmp_path / "checkpoints")[-1].name == f"step-{good:08d}"


@pytest.mark.parametrize("amount", [None, 10**15])
def test_too_little_memory_is_named_and_the_run_can_go_on(
    amount: int | None, tmp_path: Path
) -> None:
    def exhaust(*_: object) -> None:
        if amount is None:
            raise MemoryError
        torch.empty(amount)

    train(tmp_path, until=4)
    model = noisy_model()
    handle = model.encoder.register_forward_hook(exhaust)
    with pytest.raises(TrainingError, match="step 5: out of memory"):
        run_training(model, batches(), SETTINGS, tmp_path, steps=STEPS)
    handle.remove()
    assert train(tmp_path).state.step == STEPS


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [60_000, 250_000])
def test_a_write_that_fails_ends_the_run_and_keeps_the_last_good_one(
    size: int, tmp_path: Path
) -> None:
    """The limits let the log through, and stop the weights or the optimizer's file."""
    train(tmp_path / "whole")
    train(tmp_path / "parts", until=4)
    with file_size_limit(size), pytest.raises(SaveError):
        train(tmp_path / "parts")
    folder = tmp_path / "parts" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000004"]
    train(tmp_path / "parts")
    assert not differences(tmp_path / "parts", tmp_path / "whole")


def test_a_corrupt_newest_checkpoint_is_left_for_an_earlier_one_only_when_asked(
    tmp_path: Path,
) -> None:
    train(tmp_path / "whole")
    train(tmp_path / "parts")
    newest = checkpoints(tmp_path / "parts" / "checkpoints")[-1]
    (newest / "training.pt").write_bytes(b"nothing")
    with pytest.raises(CorruptFile, match="--resume-from 8"):
        train(tmp_path / "parts")
    with pytest.raises(ResumeMismatch, match="no checkpoint of step 5"):
        train(tmp_path / "parts", resume_from=5)
    train(tmp_path / "parts", resume_from=8)
    assert not differences(tmp_path / "parts", tmp_path / "whole")


def test_other_settings_are_taken_when_that_is_asked_for(tmp_path: Path) -> None:
    train(tmp_path, until=4)
    slower = SETTINGS.with_changes(learning_rate=1e-5, schedule="constant", warmup=0)
    options = {"steps": 6, "save_every": 50, "facts": {"data": "other"}}
    with pytest.raises(ResumeMismatch, match="data|recipe"):
        run_training(noisy_model(), batches(), slower, tmp_path, **options)
    done = run_training(noisy_model(), batches(), slower, tmp_path, strict=False, **options)
    assert [record.step for record in done.state.history] == [5, 6]
    assert [record.learning_rate for record in done.state.history] == [1e-5, 1e-5]


def test_more_steps_than_before_are_ordinary_and_as_if_they_had_been_planned(
    tmp_path: Path,
) -> None:
    torch.manual_seed(7)
    planned = run_training(noisy_model(), batches(), SETTINGS, tmp_path / "whole", steps=6)
    torch.manual_seed(7)
    run_training(noisy_model(), batches(), SETTINGS, tmp_path / "parts", steps=4)
    longer = run_training(noisy_model(), batches(), SETTINGS, tmp_path / "parts", steps=6)
    assert [record.step for record in longer.state.history] == [5, 6]
    wanted = planned.state.model.state_dict()
    for name, tensor in longer.state.model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    with pytest.raises(TrainingError, match="expected at least 6, found 5"):
        run_training(noisy_model(), batches(), SETTINGS, tmp_path / "parts", steps=5)


def test_more_steps_are_another_setting_where_the_rate_depends_on_them(tmp_path: Path) -> None:
    falling = SETTINGS.with_changes(schedule="linear")
    run_training(noisy_model(), batches(), falling, tmp_path, steps=2)
    with pytest.raises(ResumeMismatch, match="steps is not what the run was started with"):
        run_training(noisy_model(), batches(), falling, tmp_path, steps=4)


def test_a_line_of_the_log_that_a_kill_cut_in_half_is_written_again(tmp_path: Path) -> None:
    train(tmp_path / "whole")
    train(tmp_path / "parts", until=7)
    log = tmp_path / "parts" / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 8, "loss": 7.1')
    train(tmp_path / "parts")
    assert measurements(tmp_path / "parts") == measurements(tmp_path / "whole")


def test_nothing_to_predict_is_a_step_of_loss_zero() -> None:
    empty = {name: tensor.clone() for name, tensor in batches()(0).items()}
    empty["labels"].fill_(-100)
    padding = {**empty, "attention_mask": torch.zeros_like(empty["attention_mask"])}
    for batch in (empty, padding):
        model = small_model()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        record = fit(start(model, PLAIN, steps=1), lambda step, b=batch: b, PLAIN, steps=1)[0]
        assert record.loss == 0.0
        assert record.gradient_norm == 0.0
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def record_of(step: int, **values: object) -> StepRecord:
    plain = StepRecord(step, 2.0, {"cross_entropy": 2.0}, 1.0, 1e-3, 100, 0.1)
    return replace(plain, **values)


@pytest.mark.parametrize(
    ("cause", "values", "words"),
    [
        ("drops", {"dropped": 0.4}, "40% of tokens"),
        ("collapse", {"max_violation": 2.9}, "one expert takes nearly everything"),
        ("idle", {"idle": ((0, 1), (1, 3)), "dead": 2}, "expert 1 of sparse layer 0"),
        ("spike", {"loss": 20.0}, "jumped to 20"),
        ("skipped", {"skipped": True, "culprit": "output of x"}, "output of x"),
    ],
)
def test_a_warning_says_what_is_wrong_once_and_again_after_it_has_passed(
    cause: str, values: dict[str, object], words: str
) -> None:
    watch = Watch(steps=90, every=10, num_experts=4, stream=io.StringIO())
    said = []
    for step in range(1, 61):
        wrong = 11 <= step <= 30 or 41 <= step <= 50
        said.append(watch(record_of(step, **(values if wrong else {}))))
    assert cause in advice([record_of(i, **values) for i in range(10)], 4, before=2.0)
    found = {step: texts for step, texts in enumerate(said, 1) if texts}
    assert set(found) == {20, 50}
    assert all(words in texts[0] for texts in found.values())
    assert words in watch.stream.getvalue()


@pytest.mark.parametrize("stop", [4, 14, 20, 23])
def test_a_run_that_goes_on_has_the_rows_and_warnings_of_one_that_never_stopped(stop: int) -> None:
    """Drops from the start, a loss that jumps, experts that are idle now and then."""

    def records() -> Iterator[StepRecord]:
        for step in range(1, 41):
            loss = 20.0 if step in (12, 25) else 2.0 + step / 7
            idle = ((0, 1), (0, 2)) if step % 3 else ((0, 1), (1, 3))
            yield record_of(step, loss=loss, dropped=0.4, max_violation=step / 10, idle=idle)

    def watched(watch: Watch, steps: Iterable[StepRecord]) -> tuple[list[list[str]], list[str]]:
        said = [watch(record) for record in steps]
        return said, [x for x in watch.stream.getvalue().splitlines() if "step" not in x[:9]]

    options: dict[str, Any] = {"steps": 40, "every": 10, "num_experts": 4}
    said, rows = watched(Watch(**options, stream=io.StringIO()), records())
    assert any("idle" in text or "no token" in text for texts in said for text in texts)
    first = Watch(**options, stream=io.StringIO())
    before, one = watched(first, islice(records(), stop))
    file = io.BytesIO()
    torch.save(first.memory(), file)
    file.seek(0)
    memory = torch.load(file, weights_only=True)
    second = Watch(**options, stream=io.StringIO(), memory=memory)
    after, other = watched(second, islice(records(), stop, None))
    assert before + after == said
    assert one + other == rows


def test_a_run_goes_on_in_the_middle_of_a_row(tmp_path: Path, capsys: CaptureFixture[str]) -> None:
    def losses(directory: Path, *stops: int) -> list[str]:
        for until in (*stops, 12):
            train(directory, until=until, table_every=5)
        return [line.split()[1] for line in capsys.readouterr().err.splitlines()
                if line[:9].strip().isdigit()]  # fmt: skip

    whole = losses(tmp_path / "whole")
    assert len(set(whole)) == 3
    assert losses(tmp_path / "parts", 3, 7) == whole


def test_a_row_of_a_dense_run_has_dashes_for_what_it_lacks() -> None:
    cells = row([record_of(1)]).split()
    assert "nan" not in cells
    assert cells.count("-") == 3  # balance, z, entropy


def test_experts_of_a_real_run_that_no_token_reaches_are_reported() -> None:
    model = small_model(router_losses={})
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "classifier"):
                module.classifier.weight.zero_()  # ties go to expert 0
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.shared.weight.requires_grad_(True)
    state: TrainingState = start(model, PLAIN, steps=10)
    records = fit(state, batches(), PLAIN, steps=10)
    assert {(layer, expert) for layer in (0, 1) for expert in (1, 2, 3)} == set(records[0].idle)
    assert "6 experts had no token for 10 steps" in advice(records, 4)["idle"]
