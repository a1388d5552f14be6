"""A group of readers, stopped in mid-epoch and started again: every sample exactly once per epoch all the same."""

import json
from itertools import islice

import pytest

from reelway.cluster.dataset import DatasetInfo, create_dataset
from reelway.cluster.manifest import merge_manifest, plan
from reelway.cluster.shards import Reading, ShardReader, write_shard
from reelway.cluster.storage import Storage

KEYS = [f"k{index:02d}" for index in range(23)]  # shards of 5, 5, 5, 5 and 3: no number of readers divides them
EPOCHS = 3


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = Storage.open(tmp_path_factory.mktemp("set"))
    info = DatasetInfo(kind="texts", fields={"prompt.txt": {}}, made_by={}, fingerprint="f")
    create_dataset(storage, info)
    for shard in plan(KEYS, 5, "f"):
        write_shard(storage, shard, ((key, {"prompt.txt": key}) for key in shard.keys))
    merge_manifest(storage)
    return storage


def _keys(stream: object) -> list[str]:
    return [sample["__key__"] for sample in stream]


def _read(storage: Storage, reading: Reading, stop_after: int | None) -> list[list[str]]:
    """The keys of each epoch; with `stop_after`, every epoch is left at that sample and gone on with from its state."""
    reader, epochs = ShardReader(storage, None, reading), []
    for _ in range(EPOCHS):
        before: list[str] = []
        if stop_after is not None:
            before = _keys(islice(iter(reader), stop_after))
            reader = ShardReader.from_state(storage, None, reading, json.loads(json.dumps(reader.state())))
        epochs.append(before + _keys(reader))
    return epochs


@pytest.mark.parametrize("window", [1, 7])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_group_that_is_stopped_in_mid_epoch_loses_and_repeats_nothing(
    storage: Storage, world: int, window: int
) -> None:
    readings = [Reading(seed=3, rank=rank, world=world, window=window) for rank in range(world)]
    undisturbed = [_read(storage, reading, None) for reading in readings]
    # Each rank stops somewhere else: the first before its first sample, the others within or at a shard's end.
    stopped = [_read(storage, reading, 2 * rank) for rank, reading in enumerate(readings)]
    assert stopped == undisturbed
    for epoch in range(EPOCHS):
        seen = [key for parts in stopped for key in parts[epoch]]
        assert sorted(seen) == KEYS
    assert undisturbed[0][0] != undisturbed[0][1]
