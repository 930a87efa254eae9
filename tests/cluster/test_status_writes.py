"""What the API server says of a status that was decided on an older object, and what the operator makes of it."""

from __future__ import annotations

import asyncio
import json

import pytest
import yaml
from operators import apply_crds
from test_life import JOB

from sonoforge_operator.cluster.api_client import JOBS, Api, ApiError, ConflictError


def test_a_status_is_written_only_on_the_object_that_was_seen(control_plane, namespace, kubectl):
    apply_crds(control_plane)
    kubectl("apply", "--filename=-", stdin=yaml.safe_dump(next(yaml.safe_load_all(JOB))))

    async def write() -> None:
        async with await Api.connect(str(control_plane.kubeconfig)) as api:
            seen = await api.get(JOBS, namespace, "fetal")
            await asyncio.to_thread(kubectl, "annotate", "pj", "fetal", "touched=yes")
            with pytest.raises(ConflictError):
                await api.put_status(JOBS, seen, {"phase": "Running"})
            now = await api.get(JOBS, namespace, "fetal")
            written = await api.put_status(JOBS, now, {"phase": "Running", "reason": "Training"})
            await api.put_status(JOBS, written, {"phase": "Failed"})
            with pytest.raises(ApiError, match="422") as refused:
                await api.put_status(JOBS, await api.get(JOBS, namespace, "fetal"), {"step": "many"})
            assert not isinstance(refused.value, ConflictError)

    asyncio.run(write())
    status = json.loads(kubectl("get", "pj", "fetal", "--output=json"))["status"]
    assert status["phase"] == "Failed"
    assert "reason" not in status, "it is replaced, not merged"
