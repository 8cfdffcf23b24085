"""Places of the work that have the same numbers must not have the same random state."""

from __future__ import annotations

import torch

from dfkd_cli.models.classifier import ModelInfo
from dfkd_cli.seeds import derive, seed_torch
from dfkd_cli.stages.training import fresh
from dfkd_cli.trust import Code


def test_domains_and_lengths_keep_seeds_apart():
    keys = [("step", 0), ("step", 0, 0), ("step", 0, 0, 0), ("step", 1), ("shard", 0), ("order", 0, 0), ("holdout", 0)]
    assert len({derive(*key) for key in keys}) == len(keys)
    assert derive("step", 3, 4) == derive("step", 3, 4)
    assert all(0 <= derive("step", i) < 2**63 for i in range(100))


def test_a_student_does_not_start_from_its_teachers_first_weights():
    info = ModelInfo("lenet5", 10, (1, 32, 32), (0.0,), (1.0,))
    teacher, student, again = (fresh(info, role, 0, Code()).head().weight for role in ("teacher", "student", "student"))
    assert not torch.equal(teacher, student)
    assert torch.equal(student, again)


def test_seeding_one_device_is_what_manual_seed_does_to_it():
    seed_torch(torch.device("cpu"), "step", 1, 2)
    ours = torch.rand(5)
    torch.random.manual_seed(derive("step", 1, 2))
    assert torch.equal(ours, torch.rand(5))
