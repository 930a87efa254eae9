"""Data sets are tested with the small images and the helpers of the shard tests."""

from tests.shards.conftest import (  # noqa: F401 - fixtures
    _own_configuration,
    call,
    encoded,
    folder,
    real,
    speckle,
    storage,
    table,
)
