"""The parts of torch's elastic agent that this project reaches into are what they were when that was written.

They are private, so torch may change them in any release. When one of these tests fails on a new torch: read what
changed there, read the reason given beside it, run tests/rendezvous/test_elastic.py, and only then write down the new
digest. `trainer` in pyproject.toml keeps torch below the next minor release until that is done.
"""

import dataclasses
import hashlib
import importlib
import inspect

import pytest
import torch
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import dynamic_rendezvous as dynamic

READ = "2.15"
"""The torch whose source was read."""

RELIED_ON = [
    (
        "torch.distributed.elastic.rendezvous.dynamic_rendezvous.DynamicRendezvousHandler.next_rendezvous",
        "14cdaa5baee7f77b",
        "it builds the store's address once unless _bootstrap_store_info and _shared_tcp_store_server are None",
    ),
    (
        "torch.distributed.elastic.rendezvous.dynamic_rendezvous.DynamicRendezvousHandler._keep_alive",
        "87c3aaeb3f7b1b48",
        "it takes _heartbeat_lock and swallows RendezvousError only",
    ),
    (
        "torch.distributed.elastic.rendezvous.dynamic_rendezvous.DynamicRendezvousHandler._start_heartbeats",
        "d2930f312371b088",
        "heartbeats run in a thread, between rounds too",
    ),
    (
        "torch.distributed.elastic.rendezvous.dynamic_rendezvous.DynamicRendezvousHandler._stop_heartbeats",
        "9cf2cbcd6d212414",
        "it may be called twice and before a start",
    ),
    (
        "torch.distributed.elastic.rendezvous.dynamic_rendezvous._RendezvousJoinOp.__call__",
        "d44e1d82e7a3391f",
        "a node that finds itself in a complete round is done; others wait in the wait list",
    ),
    (
        "torch.distributed.elastic.rendezvous.dynamic_rendezvous._RendezvousExitOp.__call__",
        "d50ba313a525c6c6",
        "a participant removes itself before it joins again",
    ),
    (
        "torch.distributed.elastic.rendezvous.dynamic_rendezvous._DistributedRendezvousOpExecutor.run",
        "84a537379dfdec19",
        "it works on the holder's state object and marks it dirty after each change",
    ),
    (
        "torch.distributed.elastic.rendezvous.dynamic_rendezvous._DistributedRendezvousOpExecutor._mark_rendezvous_complete",
        "adbf9644bac45cf1",
        "ranks are the sorted order of participants",
    ),
    (
        "torch.distributed.elastic.rendezvous.dynamic_rendezvous._DistributedRendezvousOpExecutor._add_to_participants",
        "435550a27fef9fb9",
        "the last call is read from the settings when the minimum is reached",
    ),
    (
        "torch.distributed.elastic.rendezvous.dynamic_rendezvous._remove_participant_epilogue",
        "9ab82f49936434a1",
        "a complete round that everybody left opens the next; `membership.drop` does the same",
    ),
    (
        "torch.distributed.elastic.rendezvous.api.RendezvousStoreInfo.build",
        "0767a5cd9af2d5b9",
        "rank 0 writes the address under fixed keys of the round, the others wait for it",
    ),
    (
        "torch.distributed.elastic.agent.server.api.SimpleElasticAgent._invoke_run",
        "376e457facabbfbc",
        "failures restart while _remaining_restarts is above 0, num_nodes_waiting above 0 restarts for free",
    ),
    (
        "torch.distributed.elastic.agent.server.api.SimpleElasticAgent.run",
        "1f0bf1529692b17f",
        "SignalException shuts workers down with the shutdown timeout and is raised again",
    ),
    (
        "torch.distributed.elastic.agent.server.api.SimpleElasticAgent._rendezvous",
        "f0c843d67c04a7fc",
        "a store error while ranks are assigned leaves the group as it was",
    ),
    (
        "torch.distributed.elastic.agent.server.local_elastic_agent.LocalElasticAgent._start_workers",
        "d86e8446ebadc6ea",
        "a callable entry point starts by the start method given, with RANK and MASTER_ADDR in the environment",
    ),
    (
        "torch.distributed.elastic.agent.server.local_elastic_agent.LocalElasticAgent._monitor_workers",
        "4ba1c04fe76bba95",
        "failures are keyed by global rank",
    ),
    (
        "torch.distributed.elastic.multiprocessing.api.MultiprocessContext._poll",
        "5b291186e8aaa27a",
        "a worker that exits by SystemExit is a failure with its exit code",
    ),
    (
        "torch.distributed.elastic.multiprocessing.api._wrap",
        "1ac947e328324d6d",
        "the environment is set in the worker before the function runs",
    ),
    (
        "torch.distributed.elastic.multiprocessing.errors.ProcessFailure.__post_init__",
        "a3e3bd8495adae41",
        "an error file with a text as message is accepted and kept in error_file_data",
    ),
    (
        "torch.distributed.rendezvous._create_c10d_store",
        "c228359642dde378",
        "with a store of the agent, workers connect without a prefix for the attempt",
    ),
]
"""Function, digest of its source, what of it is relied on."""


def located(name):
    """A function of torch by its dotted name. Modules are imported by name, since torch hides some behind functions."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


def digest(function):
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]


def test_the_installed_torch_was_read():
    assert torch.__version__.startswith(READ + "."), (
        f"torch {torch.__version__} is installed, and the elastic agent was read in {READ}: go through RELIED_ON"
    )


@pytest.mark.parametrize(("name", "want", "reason"), RELIED_ON, ids=[row[0].split("elastic.")[-1] for row in RELIED_ON])
def test_what_is_relied_on_did_not_change(name, want, reason):
    assert digest(located(name)) == want, f"{name} changed in torch {torch.__version__}. Check: {reason}"


@pytest.mark.parametrize(
    ("function", "want"),
    [
        (
            dynamic.DynamicRendezvousHandler.__init__,
            ["self", "node", "settings", "backend_name", "store", "state_holder"],
        ),
        (dynamic._DistributedRendezvousOpExecutor.run, ["self", "state_handler", "deadline", "update_deadline"]),
        (dynamic.DynamicRendezvousHandler._create_tcp_store_server, ["self", "master_addr", "master_port"]),
        (LocalElasticAgent._shutdown, ["self", "death_sig", "timeout"]),
        (LocalElasticAgent._stop_workers, ["self", "worker_group"]),
        (LocalElasticAgent._monitor_workers, ["self", "worker_group"]),
        (LocalElasticAgent._rendezvous, ["self", "worker_group"]),
        (
            LocalElasticAgent._assign_worker_ranks,
            ["self", "store", "group_rank", "group_world_size", "spec"],
        ),
        (dynamic.DynamicRendezvousHandler._get_world, ["self"]),
        (dynamic.DynamicRendezvousHandler._get_store, ["self"]),
        (LocalElasticAgent._exit_barrier, ["self"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_overridden_and_called_functions_keep_their_parameters(function, want):
    assert list(inspect.signature(function).parameters) == want


def test_the_state_that_is_written_as_json_has_no_field_more():
    """A field that torch adds must be added to `membership.encode` and `decode`, or it is lost between agents."""
    assert sorted(vars(dynamic._RendezvousState())) == [
        "closed",
        "complete",
        "deadline",
        "last_heartbeats",
        "participants",
        "redundancy_list",
        "round",
        "wait_list",
    ]
    assert [field.name for field in dataclasses.fields(dynamic._NodeDesc)] == ["addr", "pid", "local_id"]
    assert dynamic._RendezvousStateHolder.__abstractmethods__ == {"state", "sync", "mark_dirty"}


def test_the_settings_and_actions_are_the_known_ones():
    assert [field.name for field in dataclasses.fields(dynamic.RendezvousSettings)] == [
        "run_id",
        "min_nodes",
        "max_nodes",
        "timeout",
        "keep_alive_interval",
        "keep_alive_max_attempt",
        "cas_backoff_max_seconds",
    ]
    assert [action.name for action in dynamic._Action] == [
        "KEEP_ALIVE",
        "ADD_TO_PARTICIPANTS",
        "ADD_TO_WAIT_LIST",
        "ADD_TO_REDUNDANCY_LIST",
        "REMOVE_FROM_PARTICIPANTS",
        "REMOVE_FROM_WAIT_LIST",
        "REMOVE_FROM_REDUNDANCY_LIST",
        "MARK_RENDEZVOUS_COMPLETE",
        "MARK_RENDEZVOUS_CLOSED",
        "SYNC",
        "ERROR_CLOSED",
        "ERROR_TIMEOUT",
        "FINISH",
    ]


def test_the_attributes_that_the_handler_touches_exist():
    source = inspect.getsource(dynamic.DynamicRendezvousHandler.__init__)
    for name in (
        "_bootstrap_store_info",
        "_shared_tcp_store_server",
        "_heartbeat_lock",
        "_state_holder",
        "_op_executor",
        "_this_node",
        "_settings",
    ):
        assert f"self.{name}" in source, f"DynamicRendezvousHandler has no {name} any more; see rendezvous.py"


def test_torchrun_finds_the_handler():
    from torch.distributed.elastic.rendezvous import RendezvousParameters, registry

    registry._register_out_of_tree_handlers()
    parameters = RendezvousParameters("sonoforge", "127.0.0.1:1", "a", 1, 2, "127.0.0.2", last_call_timeout="0.5")
    handler = registry.get_rendezvous_handler(parameters)
    assert handler.get_backend() == "sonoforge"
    assert handler.settings.timeout.last_call.total_seconds() == 15, "the first round waits longer"
    handler.settings.timeout.first_round = False
    assert handler.settings.timeout.last_call.total_seconds() == 0.5
