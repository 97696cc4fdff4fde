"""`verify` agrees with PEFT on a good adapter, and notices a wrong one."""

import dataclasses
import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file
from tiny_runs import tiny_run

from jaxlora import verification
from jaxlora.cli import main
from jaxlora.core.errors import UserError
from jaxlora.verification import TOLERANCE, Verdict, verify

pytest.importorskip("torch")
pytest.importorskip("peft")

GOOD = Verdict(max_difference=0.0, logit_std=1.0, adapter_effect=1.0, missing=(), extra=())


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_tiny_llama):
    return tiny_run(tmp_path_factory, write_tiny_llama)


@pytest.fixture(scope="module")
def verdict(run):
    return verify(run.folder)


def test_the_adapter_of_a_run_is_verified(verdict):
    assert verdict.ok
    assert verdict.missing == verdict.extra == ()
    assert verdict.adapter_effect > 100 * TOLERANCE, "an adapter that does nothing proves nothing"


def test_base_and_adapter_may_be_named_apart(run, verdict):
    assert verify(run.base, run.folder).ok


def test_logits_that_differ_are_noticed(run, monkeypatch, capsys):
    computed = verification.probe_logits
    monkeypatch.setattr(verification, "probe_logits", lambda *given: computed(*given) + 0.01)
    assert not verify(run.folder).ok
    assert main(["verify", str(run.folder)]) == 1
    assert "NOT verified" in capsys.readouterr().out


def test_a_tensor_altered_on_one_side_is_noticed(run, tmp_path, monkeypatch):
    altered = shutil.copytree(run.folder, tmp_path / "altered")
    tensors = load_file(altered / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.lora_B.weight"))
    tensors[name] = -tensors[name]
    save_file(tensors, altered / "adapter_model.safetensors", metadata={"format": "pt"})
    reference = verification._peft_logits
    monkeypatch.setattr(
        verification, "_peft_logits", lambda base, folder, *rest: reference(base, altered, *rest)
    )
    assert not verify(run.folder).ok


def test_a_scale_that_only_peft_reads_is_noticed(run, tmp_path, monkeypatch):
    altered = shutil.copytree(run.folder, tmp_path / "altered")
    path = altered / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_rslora": True}))
    reference = verification._peft_logits
    monkeypatch.setattr(
        verification, "_peft_logits", lambda base, folder, *rest: reference(base, altered, *rest)
    )
    assert not verify(run.folder).ok


@pytest.mark.parametrize("field", ["missing", "extra"])
def test_tensors_that_peft_does_not_pair_are_not_ok(field):
    assert GOOD.ok
    assert not dataclasses.replace(GOOD, **{field: ("base_model.model.x.lora_A.weight",)}).ok


def test_logits_that_are_no_numbers_are_not_ok():
    assert not dataclasses.replace(GOOD, max_difference=float("nan")).ok


def test_verifying_what_is_no_adapter_is_refused(run):
    with pytest.raises(UserError, match="no adapter"):
        verify(run.base)


def test_verified_command_exits_0(run, capsys):
    assert main(["verify", str(run.folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "verified"
