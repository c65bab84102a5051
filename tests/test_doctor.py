"""The doctor's table and exit status."""

from __future__ import annotations

import re

import pytest

from proxy_losses.doctor import _local, _proof
from proxy_losses.doctor.__main__ import main
from proxy_losses.doctor._outcome import Outcome, bounded


def test_a_healthy_machine(capsys):
    assert main(["--quick", "--device", "cpu", "--processes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("proxy_losses ")
    names = [re.match(r"(pass|skip|FAIL)  (.*?)  ", line) for line in lines[1:-1]]
    assert [m[2].strip() for m in names if m] == list(_local.CHECKS)
    assert [m[1] for m in names if m].count("skip") == 1
    assert lines[-1] == f"{len(_local.CHECKS) - 1} passed, 0 failed"


def test_failures_are_told_and_change_the_exit_status(capsys, monkeypatch):
    def broken(device):
        raise RuntimeError("no such thing\nmore")

    checks = {"broken": broken, "off": lambda device: bounded("off", 0.5, 0.1, "error")}
    monkeypatch.setattr(_local, "CHECKS", checks)
    assert main(["--device", "cpu", "--processes"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"FAIL  broken +RuntimeError: no such thing\n", out)
    assert re.search(r"FAIL  off +error 5.0e-01 \(at most 1e-01\)\n", out)
    assert out.endswith("0 passed, 2 failed\n")


def test_processes_are_compared_with_one(capsys, monkeypatch):
    monkeypatch.setattr(_local, "CHECKS", {})
    monkeypatch.setattr(_proof, "KINDS", {"SmoothAPLoss": _proof.KINDS["SmoothAPLoss"]})
    results = [_proof.Result(1e-16, 0.0, 0.0), _proof.Result(1e-3, 0.0, 0.0)] * 2
    monkeypatch.setattr(_proof, "prove", lambda world, todo, backend: results[: len(todo)])
    assert main(["--device", "cpu", "--processes", "2"]) == 1
    out = capsys.readouterr().out
    assert len(re.findall(r"FAIL  2 processes, SmoothAPLoss, (?:gather|shard) ", out)) == 2
    assert "gradient off by 1.0e-03" in out


def test_nccl_without_enough_gpus_is_left_out(capsys, monkeypatch):
    monkeypatch.setattr(_local, "CHECKS", {})
    assert main(["--device", "cpu", "--backend", "nccl", "--processes", "64"]) == 0
    assert "skip  64 processes" in capsys.readouterr().out


def test_not_a_number_is_no_pass():
    assert bounded("x", float("nan"), 1.0, "error") == Outcome(
        "x", False, "error nan (at most 1e+00)"
    )


@pytest.mark.slow
def test_compiled_code_agrees():
    assert _local.compiled("cpu").passed
