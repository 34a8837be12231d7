import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import train


def test_two_processes_profile_as_one(data, tmp_path):
    """omega is that of the global batch: two workers' first batches, or one worker's first two."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    group = [
        *("--distributed-world-size", "2", "--distributed-init-method", f"tcp://localhost:{port}"),
        *("--distributed-no-spawn", "--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp", "--dropout", "0"),
    ]

    def worker(rank):
        return train(data, tmp_path / "two", *group, "--distributed-rank", rank, updates=2)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(worker, range(2)))
    assert [result.code for result in results] == [0, 0], results[1].output
    assert results[0].lines("training on 2 devices")
    one = train(data, tmp_path / "one", "--admin-profile-batches", "2", "--dropout", "0", updates=1)
    assert one.code == 0, one.output
    two, one = (json.loads((tmp_path / name / "admin_profile.json").read_text()) for name in ("two", "one"))
    assert (two["settings"]["world_size"], two["tokens"]) == (2, one["tokens"])
    for stack in ("encoder", "decoder"):
        assert two[stack] == pytest.approx(one[stack], rel=1e-6)
