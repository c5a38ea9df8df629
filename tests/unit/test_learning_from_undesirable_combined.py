"""Learning from the undesirable beside other things: its base objective, recipes it refuses, two processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from fakes import KnownLogp
from safetensors.torch import load_file, save_file

import two_processes
from helpers import make_session, random_rows, settings, tiny_llama, weights
from luthier.core.errors import UserError
from luthier.engine.distributed import Processes
from luthier.engine.loop import Trainer
from luthier.methods.objectives.learning_from_undesirable import LearningFromUndesirable, base
from luthier.recipe.load import load
from luthier.recipe.plan import plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_objective": "learning-from-undesirable"}, "cannot be its own base"),
        ({"base_objective": "sfd"}, "Did you mean 'sft'"),
        ({"base_objective": {"sft": {"x": 1}}}, r"sft\.x: Extra inputs"),
        ({"base_objective": {"sft": {}, "focal": {}}}, "not 2 names"),
        ({"base_objective": {"beyond-log-likelihood": {"objective": "top_p-0.3"}}}, "depends on the model"),
        ({"aux": "steer", "aux_targets": ["q_proj"]}, "remove them"),
        ({"distance": "cosine", "layer_norm_targets": True}, "remove layer_norm_targets"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        LearningFromUndesirable(**options)


def test_a_users_function_can_be_the_base(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from luthier.core.registry import objective\n\n@objective('square')\n"
        "def square(logp_N, weight_N, *, factor: float = 1.0):\n    return factor * logp_N**2 * weight_N\n"
    )
    out = KnownLogp(torch.tensor([-1.0, -3.0]))
    batch = type("Weights", (), {"weight_N": torch.tensor([1.0, 0.5])})
    loss = base({f"{file}:square": {"factor": 2.0}}).loss(out, batch, None)
    assert (loss.sum.item(), loss.weight.item()) == (11.0, 1.5)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": ["learning-from-undesirable", "sft"]}, "base_objective.* give it as the only objective"),
        ({"training": {"gradient_checkpointing": True}}, "gradient_checkpointing: false"),
        ({"training": {"sharding": "fsdp2"}}, "choose another training.sharding"),
    ],
)
def test_what_a_recipe_cannot_combine(sections, message):
    recipe = {"luthier": 1, "model": "lab:nano", "data": {"train": "lab:arithmetic"}}
    with pytest.raises(UserError, match=message):
        plan(load({**recipe, "objective": "learning-from-undesirable", **sections}))


TRAINING = {
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "schedule": "constant",
    "batch_rows": 6,
    "epochs": 2,
}


def train(processes):
    objective = LearningFromUndesirable(alpha=0.5, consistency_weight=3.0, twin_per="example")
    session = make_session(tiny_llama(tied=True), objective=objective, processes=processes)
    # 19 rows leave one process without a row in an epoch's last step.
    Trainer(session, random_rows(19), settings(**TRAINING)).run()
    return session


def main(folder):
    torch.set_num_threads(1)
    processes = Processes("ddp", device="cpu")
    save_file(weights(train(processes).model), Path(folder) / f"rank-{processes.rank}.safetensors")
    two_processes.leave()


@pytest.mark.distributed
def test_with_a_twin_per_example_two_processes_give_the_trajectory_of_one(tmp_path):
    two_processes.launch(__file__, str(tmp_path))
    alone = weights(train(Processes(device="cpu")).model)
    first, second = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        torch.testing.assert_close(value, alone[name], atol=2e-5, rtol=1e-3)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
