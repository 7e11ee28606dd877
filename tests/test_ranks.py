"""Slices of ranks, shared cores and devices; merged parts and atomic writes."""
import os

import pytest
import torch

from models.running.files import atomic_write, merge_parts
from models.running.ranks import (
    barrier,
    broadcast_from_rank0,
    init_distributed,
    per_local_rank,
    rank_slice,
)


@pytest.mark.parametrize("n", [0, 1, 5, 64, 1001])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_slices_of_all_ranks_are_the_list_in_order(n, world_size):
    parts = [rank_slice(n, rank, world_size) for rank in range(world_size)]
    assert [i for part in parts for i in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_single_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert init_distributed(torch.device("cpu")) == (0, 1, torch.device("cpu"))
    barrier()
    assert broadcast_from_rank0("value") == "value"


def test_cores_are_shared_among_local_ranks(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert per_local_rank(8) == 2
    assert per_local_rank(2) == 1


def test_a_device_with_an_index_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert init_distributed(torch.device("cuda:3")) == (0, 1, torch.device("cuda:3"))
    assert current == [torch.device("cuda:3")]


@pytest.mark.parametrize(
    ("ranks", "device", "backend"), [(2, "cuda:1", "nccl"), (8, "cuda:1", "gloo")]
)
def test_ranks_share_the_devices_of_their_machine(ranks, device, backend, monkeypatch):
    for name, value in {
        "RANK": 11,
        "WORLD_SIZE": 16,
        "LOCAL_RANK": ranks - 1,
        "LOCAL_WORLD_SIZE": ranks,
    }.items():
        monkeypatch.setenv(name, str(value))
    joined = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", joined.append)
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda name, **given: joined.append((name, given["device_id"])),
    )
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 11)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 16)
    chosen = torch.device(device)
    assert init_distributed(torch.device("cuda:0")) == (11, 16, chosen)
    assert joined == [chosen, (backend, chosen if backend == "nccl" else None)]


def test_merged_parts_follow_the_header(tmp_path):
    parts = [tmp_path / f"{i}.part" for i in range(12)]
    for i, part in enumerate(parts):
        part.write_bytes(b"%d\n" % i * i)
    merge_parts(parts, tmp_path / "whole", b"head\n")
    assert (tmp_path / "whole").read_bytes() == b"head\n" + b"".join(
        part.read_bytes() for part in parts
    )


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    target = tmp_path / "result"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(target) as temporary_path:
        temporary_path.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["result"]
