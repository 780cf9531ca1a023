"""``mlx.launch`` and ``mpirun`` bring up the cluster with local ranks, and the model answers."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from tests.e2e.cluster_processes import PATIENCE_SECONDS, ClusterProcesses, alive, within
from tests.reference_tokens import Reference, reference_tokens
from tests.tiny_models import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("launch") / "tiny", layers=6, width=64, vocab=320)


@pytest.fixture(scope="module")
def references(model_dir: Path) -> list[Reference]:
    rng = random.Random(3)
    prompts = [tuple(rng.randrange(256) for _ in range(length)) for length in range(3, 40, 3)]
    clear = [r for r in reference_tokens(model_dir, prompts, 10) if r.gap > 1e-3]
    assert len(clear) >= 8
    return clear[:8]


@contextmanager
def launched(cluster: ClusterProcesses, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The launcher in a session of its own, so that its whole family can be ended."""
    with (cluster.folder / "launcher.log").open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,  # mlx.launch polls it: an end of file would have it spin
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"},
        )
    try:
        yield process
    except BaseException:
        print(cluster.logs())
        raise
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def answers(cluster: ClusterProcesses) -> list[int]:
    """Every gateway answers; gives the pids of all agents and stages."""
    for node in range(cluster.num_nodes):
        within(f"node {node}: ready", lambda node=node: cluster.ready(node))
    texts = [cluster.complete(node).json()["choices"][0]["text"] for node in range(cluster.num_nodes)]
    assert texts[0]
    assert len(set(texts)) == 1
    picture = cluster.admin()
    assert picture is not None
    return [n["pid"] for n in picture["nodes"]] + [s["pid"] for s in picture["pipelines"][0]["stages"]]


def test_mlx_launch_starts_one_node_for_each_rank(tmp_path: Path, model_dir: Path) -> None:
    cluster = ClusterProcesses(tmp_path, model_dir, split="2/2/2")
    command = [
        str(BIN / "mlx.launch"),
        "-n",
        "3",
        "--hosts",
        "127.0.0.1",
        "--python",
        sys.executable,
        "--cwd",
        str(ROOT),
    ]
    with launched(cluster, [*command, "launch/node.py", "--config", str(tmp_path)]):
        pids = answers(cluster)
    within("all processes end", lambda: not any(map(alive, pids)), 20)


@pytest.mark.parametrize("split", ["1/5", "2/2/2", "1/2/1/2"])
def test_mpirun_ranks_are_nodes_whose_stages_link_over_mpi_and_give_mlx_lms_tokens(
    split: str, tmp_path: Path, model_dir: Path, references: list[Reference]
) -> None:
    mpirun = shutil.which("mpirun", path=f"{BIN}:{os.environ.get('PATH', '')}")
    assert mpirun, "the dev extra brings Open MPI"
    num_nodes = split.count("/") + 1
    network = {"network": {"transport": "mpi"}}
    cluster = ClusterProcesses(tmp_path, model_dir, num_nodes=num_nodes, split=split, settings=network)
    command = [mpirun, "-n", str(num_nodes), "--oversubscribe", "--bind-to", "none", sys.executable]
    with launched(cluster, [*command, "launch/mpi_node.py", "--config", str(tmp_path)]):
        pids = answers(cluster)
        pipeline = cluster.pipeline()
        assert pipeline is not None
        assert pipeline["transport"] == "mpi"
        assert [stage["node_id"] for stage in pipeline["stages"]] == list(range(num_nodes))
        decode = Tokenizer.from_file(str(model_dir / "tokenizer.json")).decode
        with ThreadPoolExecutor(8) as pool:
            for batch in (references[:1], references):
                texts = list(pool.map(lambda r: completion(cluster, r), batch))
                assert texts == [decode(list(r.tokens), skip_special_tokens=True) for r in batch]
    within("all processes end", lambda: not any(map(alive, pids)), 20)


def completion(cluster: ClusterProcesses, reference: Reference) -> str:
    body = {"model": "tiny", "prompt": list(reference.prompt), "max_tokens": len(reference.tokens), "temperature": 0}
    url = f"{cluster.gateway(0)}/v1/completions"
    answer = httpx.post(url, json={**body, "ignore_eos": True}, timeout=PATIENCE_SECONDS, trust_env=False)
    return str(answer.json()["choices"][0]["text"])
