"""vLLM's own OpenAI server, in processes of its own: the entry point alone brings the plugin."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import TOKENS, TOLERANCE, expected, prompt_of


class Server:
    """vLLM's server, and what it answers."""

    def __init__(self, base: Path, log: Path, *options: str, saved: Path | None = None) -> None:
        """saved: a MoLoRA that is served by our own command, and not by vLLM's with ``options``."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        if "--tensor-parallel-size" in options:  # else vLLM wants a NUMA node for each worker
            workers = int(options[options.index("--tensor-parallel-size") + 1])
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(worker % 2) for worker in range(workers))
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--port", str(self.port),
            "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--enable-lora",
            "--max-lora-rank", "32", "--max-loras", "4", "--max-model-len", "400", "--max-num-seqs", "8",
            "--block-size", "32", "--num-gpu-blocks-override", "200", *options,
        ]  # fmt: skip
        if saved is not None:
            command = [
                sys.executable, "-m", "molora", "serve", str(saved), "--engine", "vllm", "--port", str(self.port),
                "--dtype", "float32", "--longest", "400",
            ]  # fmt: skip
            environment["MOLORA_CACHE"] = str(log.parent / "cache")
        self.log, self.base = log, base
        self.process = subprocess.Popen(command, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)

    def wait(self, seconds: float = 300) -> None:  # where two cores have other work, too
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-3000:])

    def post(self, path: str, **body: Any) -> tuple[int, str]:
        """Status and body."""
        send = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(send, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def complete(self, name: str, prompt: list[int], **more: Any) -> tuple[list[int], list[float]]:
        """Tokens and their log-probabilities."""
        status, body = self.post(
            "/v1/completions", model=name, prompt=prompt, temperature=0, max_tokens=TOKENS, logprobs=1,
            ignore_eos=True, return_token_ids=True, **more,
        )  # fmt: skip
        assert status == 200, body
        choice = json.loads(body)["choices"][0]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def server(base: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(
        base, tmp_path_factory.mktemp("server") / "log", "--lora-modules", f"averages={folders['averages']}"
    )
    try:
        started.wait()
        yield started
    finally:
        started.stop()


def same(found: tuple[list[int], list[float]], wanted: Any) -> None:
    assert found[0] == wanted.tokens
    assert max(abs(a - b) for a, b in zip(found[1], wanted.logprobs, strict=True)) < TOLERANCE


def test_answers_and_stacks_added_at_run_time(server: Server, models: Any, folders: dict[str, Path]) -> None:
    prompt = prompt_of(40, 200)
    same(server.complete("averages", prompt), expected(models, "averages", prompt))
    assert server.post("/v1/completions", model="gated", prompt=prompt)[0] == 404
    assert server.post("/v1/load_lora_adapter", lora_name="gated", lora_path=str(folders["gated"]))[0] == 200
    same(server.complete("gated", prompt), expected(models, "gated", prompt))
    same(server.complete("averages", prompt), expected(models, "averages", prompt))
    same(server.complete(str(server.base), prompt), expected(models, "base", prompt))


def test_a_request_brings_its_own_selection(server: Server, models: Any) -> None:
    prompt = prompt_of(40, 203)
    for choice in ({"user": "ada"}, {"domain": "math", "user": ["bob"]}):
        found = server.complete("averages", prompt, vllm_xargs={"molora": json.dumps(choice)})
        same(found, expected(models, "averages", prompt, choice))
    status, body = server.post(
        "/v1/completions", model="averages", prompt=prompt, vllm_xargs={"molora": '{"user": "eve"}'}
    )
    assert status == 400 and "no adapter 'eve'; it has ada, bob" in body
    same(server.complete("averages", prompt), expected(models, "averages", prompt))


def test_damaged_stack_is_refused_and_the_server_lives(
    server: Server, models: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folders["gated"], broken)
    (broken / "router.safetensors").write_bytes(b"no router")
    status, body = server.post("/v1/load_lora_adapter", lora_name="broken", lora_path=str(broken))
    assert status >= 400 and "is missing or damaged" in body  # vLLM hides paths
    prompt = prompt_of(40, 201)
    same(server.complete("averages", prompt), expected(models, "averages", prompt))


# Of 16 ranks each worker has 8, and both have some that act.
@pytest.mark.parametrize("more", [(), ("--fully-sharded-loras", "--max-lora-rank", "16")], ids=["", "sharded"])
def test_tensor_parallel(
    base: Path, folders: dict[str, Path], models: Any, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """Two workers, each of which has half of the embedding's rows and of every module."""
    kinds = ("averages", "gated", "twice", "deep")
    started = Server(
        base, tmp_path / "log", "--tensor-parallel-size", "2", *more,
        "--lora-modules", *(f"{kind}={folders[kind]}" for kind in kinds),
    )  # fmt: skip
    try:
        started.wait()
        prompt = prompt_of(40, 202)
        for kind in (*kinds, "averages"):
            same(started.complete(kind, prompt), expected(models, kind, prompt))
        same(started.complete(str(base), prompt), expected(models, "base", prompt))
    finally:
        started.stop()


def test_our_own_command_serves_stack_and_base(base: Path, models: Any, tmp_path: Path) -> None:
    model = models["twice"]
    model.base_name = str(base)
    model.save_pretrained(tmp_path / "mine")
    started = Server(base, tmp_path / "log", saved=tmp_path / "mine")
    try:
        started.wait()
        prompt = prompt_of(40, 200)
        same(started.complete("stack", prompt), expected(models, "twice", prompt))
        same(started.complete("base", prompt), expected(models, "base", prompt))
    finally:
        started.stop()
