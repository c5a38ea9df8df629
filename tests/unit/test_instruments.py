import pytest
import torch

from helpers import make_session, random_rows, settings, tiny_llama
from luthier.engine.loop import Interrupted, Trainer
from luthier.runs.instruments import FlopCount, Instruments


def formula(lengths, supervised, *, hidden=16, inner=32, layers=2, vocabulary=64):
    """Products of a tiny Llama's step by hand: padded rows, the head at supervised positions, attention over the square."""
    width, rows = max(lengths), len(lengths)
    matrices = 4 * hidden * hidden + 3 * hidden * inner
    linear = 6 * layers * matrices * width * rows
    forward = 2 * 2 * layers * hidden * width * width * rows
    backward = 2 * 5 * layers * hidden * width * width * rows
    # The gradient by the first block's input is needed (the embedding is trained), so every product has three.
    return linear + forward + backward + 6 * vocabulary * hidden * supervised


def test_counted_operations_are_those_of_the_formula():
    session = make_session(tiny_llama(), seed=0)
    rows = random_rows(8)
    trainer = Trainer(session, rows, settings(max_steps=1, batch_rows=8))
    count = FlopCount(1)
    trainer.around = count.around
    trainer.run()
    supervised = sum(len(ids) - len(ids) // 2 for ids in rows.ids)
    assert count.estimate(1) == pytest.approx(formula(rows.lengths.tolist(), supervised), rel=0.02)


def test_steps_that_are_not_counted_cost_the_mean_of_the_others():
    count = FlopCount(100, counted=4)
    a = torch.ones(2, 3)
    for step in range(100):
        with count.around(step):
            a @ torch.ones(3, 5 if step < 50 else 7)
    assert sorted(count.found) == [12, 37, 62, 87]
    assert count.estimate(100) == 100 * 2 * 2 * 3 * 6


def test_a_training_stopped_on_the_way_goes_on_to_the_same_end(tmp_path):
    def trainer(folder):
        return Trainer(make_session(tiny_llama(), seed=0), random_rows(), settings(epochs=2), folder=folder)

    whole = trainer(None)
    whole.run()
    with pytest.raises(Interrupted, match="after step 2"):
        trainer(tmp_path).run(until=2)
    with pytest.raises(Interrupted, match="after step 2"):  # nothing more is done for it
        trainer(tmp_path).run(resume=True, until=2)
    last = trainer(tmp_path)
    instruments = Instruments()
    instruments.begin(last)
    assert last.run(resume=True)["steps"] == whole.session.step
    assert instruments.flops() > 0
    for a, b in zip(whole.session.model.parameters(), last.session.model.parameters(), strict=True):
        assert torch.equal(a, b)
