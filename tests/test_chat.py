"""Asking a model question by question: which model that may be."""

import shutil

import pytest

from distill.chat import chat
from distill.errors import DataError
from distill.models import RUN_RECORD
from distill.store import write_manifest


def test_a_checkpoint_that_was_changed_since_it_was_made_is_not_asked(project, micro):
    out = shutil.copytree(micro / "student_system1", project / "out")
    write_manifest(out, {"mode": "system2"}, name=RUN_RECORD)
    assert chat("out", questions=[]) == []
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(DataError, match=f"model.safetensors is missing or is not what out/{RUN_RECORD} recorded"):
        chat("out", questions=[])
