"""How failures are named, and what of them is said."""

import json
import ssl

import pytest
import structlog
import torch

from sonoforge_trainer import termination
from sonoforge_trainer.contract import ENV_TERMINATION_LOG, ContractError, ExitCode, Termination


class DamagedShardError(ValueError):
    """As a module of the trainer would define it."""

    __module__ = "sonoforge_trainer.stream"
    termination_cause = "data"


class UnknownOptionError(ValueError):
    __module__ = "sonoforge_trainer.somewhere"


class IntegrityError(Exception):
    __module__ = "sonoforge_trainer.storage"


SECRET = "/data/DOE_JANE_1970.dcm"

KEPT_BACK = "(its text is not shown: it may hold paths or keys)."


@pytest.mark.parametrize(
    ("error", "cause", "code", "message"),
    [
        (ContractError("a.b: found 1.\nAllowed: 2"), "config", 64, "a.b: found 1. Allowed: 2"),
        (UnknownOptionError("x"), "config", 64, "x"),
        (DamagedShardError("shard s3://b/0.tar is cut"), "data", 65, "shard s3://b/0.tar is cut"),
        (IntegrityError("s3://b/0.tar"), "data", 65, "s3://b/0.tar"),
        (torch.OutOfMemoryError(SECRET), "memory", 71, None),
        (MemoryError(SECRET), "memory", 71, None),
        (RuntimeError(f"DefaultCPUAllocator: can't allocate memory: {SECRET}"), "memory", 71, None),
        (FloatingPointError(SECRET), "not-finite", 76, None),
        (torch.distributed.DistNetworkError(SECRET), "collective", 1, None),
        (RuntimeError(f"[gloo/transport/tcp/pair.cc:1] Connection closed by peer {SECRET}"), "collective", 1, None),
        (RuntimeError(SECRET), "application", 1, None),
        (
            RuntimeError(f"CUDA error: uncorrectable ECC error encountered {SECRET}"),
            "hardware",
            74,
            "The GPU failed: uncorrectable ECC error.",
        ),
        (
            torch.distributed.DistBackendError(f"NCCL error: uncorrectable NVLink error detected {SECRET}"),
            "hardware",
            74,
            "The GPU failed: uncorrectable NVLink error.",
        ),
        (RuntimeError(f"NVML: GPU is lost {SECRET}"), "hardware", 74, "The GPU failed: GPU is lost."),
        (RuntimeError(f"GPU has fallen off the bus {SECRET}"), "hardware", 74, "The GPU failed: fallen off the bus."),
        (RuntimeError("CUDA error: unspecified launch failure"), "application", 1, None),
        (torch.OutOfMemoryError("uncorrectable ECC error"), "memory", 71, None),
        (ContractError("device lost"), "config", 64, "device lost"),
        (ValueError(SECRET), "application", 1, None),
        (OSError(28, SECRET, SECRET), "application", 1, f"OSError: No space left on device {KEPT_BACK}"),
        (FileNotFoundError(SECRET), "application", 1, None),
        (OSError(10**20, SECRET), "application", 1, None),
        (OSError([SECRET], SECRET), "application", 1, None),
        (ssl.SSLCertVerificationError(1, SECRET), "application", 1, None),
        (SystemExit(69), "storage", 69, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_failure_has_a_class_and_foreign_text_is_kept_back(error, cause, code, message):
    name = type(error).__name__
    ending = termination.classify(error, rank=3, step=17)
    assert (ending.cause, termination.exit_code(ending)) == (cause, code)
    assert ending.message == (message or f"{name} {KEPT_BACK}")
    assert (ending.exception, ending.rank, ending.step) == (name, 3, 17)
    assert SECRET not in ending.to_json()


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RuntimeError(SECRET), "hardware"),
        (torch.distributed.DistNetworkError(SECRET), "hardware"),
        (torch.OutOfMemoryError(SECRET), "memory"),
        (ContractError("a.b: found 1"), "config"),
    ],
)
def test_what_the_driver_says_of_the_gpu_explains_what_nothing_else_does(error, cause):
    ending = termination.classify(error, fault="XID 79, fallen off the bus")
    assert ending.cause == cause
    assert (ending.message == "The GPU failed: XID 79, fallen off the bus.") == (cause == "hardware")
    assert termination.restartable(ending) is False, "another machine is the answer"


@pytest.mark.parametrize(
    ("status", "cause", "again"),
    [
        (-9, "collective", True),
        (-15, "collective", True),
        (-6, "collective", True),
        (-11, "application", False),
        (143, "terminated", True),
        (64, "config", False),
        (65, "data", False),
        (1, "application", False),
        (137, "application", False),
    ],
)
def test_a_worker_without_a_report_is_judged_by_its_exit(status, cause, again):
    """Killed from outside or told to go: start again in place. Anything else is the operator's to decide."""
    ending = termination.of_worker(status, {"message": "<NONE>"}, rank=2)
    assert (ending.cause, termination.restartable(ending), ending.rank) == (cause, again, 2)


def test_a_report_passes_through_the_error_file_that_torch_reads(tmp_path, monkeypatch):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert termination.report(DamagedShardError("shard 3 is cut"), rank=1, step=5) is ExitCode.DATA
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=65, error_file=str(tmp_path / "error.json"))
    assert failure.message == "DamagedShardError"
    want = Termination(cause="data", message="shard 3 is cut", exception="DamagedShardError", rank=4, step=5)
    assert termination.of_worker(65, failure.error_file_data, rank=4) == want


def test_a_full_disk_hides_nothing_but_the_message(tmp_path, monkeypatch):
    """Every write to /dev/full finds no space left."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    (tmp_path / "error.json.part").symlink_to("/dev/full")
    monkeypatch.setenv(ENV_TERMINATION_LOG, "/dev/full")
    with structlog.testing.capture_logs() as logged:
        assert termination.report(DamagedShardError("shard 3 is cut")) is ExitCode.DATA
        termination.write(Termination(cause="data"))
    assert not (tmp_path / "error.json").exists(), "torch does not read half a report"
    told = [(entry["event"], entry["error"]) for entry in logged]
    full = "No space left on device"
    assert told == [("report-not-written", full), ("termination-not-written", full)]


def test_a_broken_report_counts_as_none():
    assert termination.of_worker(65, {"sonoforge": {"cause": "mystery"}}, rank=0).cause == "data"


def test_the_root_cause_is_the_earliest_that_is_not_a_consequence():
    lost = Termination(cause="collective")
    data = Termination(cause="data")
    config = Termination(cause="config")
    assert termination.first([(1.0, lost), (3.0, config), (2.0, data)]) == data
    assert termination.first([(2.0, Termination(cause="terminated")), (1.0, lost)]) == lost


def test_the_termination_message_fits_into_what_kubernetes_takes(tmp_path, monkeypatch):
    file = tmp_path / "log"
    termination.write(Termination(cause="config", message="nobody asked"))
    monkeypatch.setenv("SONOFORGE_TERMINATION_LOG", str(file))
    termination.write(Termination(cause="config", message="grün" * 2000))
    assert 4000 < len(file.read_bytes()) <= 4096
    assert json.loads(file.read_text())["message"].startswith("grüngrün")
