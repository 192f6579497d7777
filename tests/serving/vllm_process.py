"""vLLM's CPU build as a child process, and what this side predicts of the same checkpoint."""

import json
import os
import selectors
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest import mock

import torch
from agreement import Agreement, compare
from quantkit_kernels import ops
from safetensors.torch import load_file
from serving_models import prompts

import quantkit

VARIABLE = "QUANTKIT_VLLM_PYTHON"
PATIENCE = 300
"""Seconds for one answer; the first takes some 20, the others some 6."""


@dataclass(frozen=True)
class Served:
    """What a server said: log-probabilities [B, T - 1, V] of the prompts, and the ids that it went on with."""

    logprobs: torch.Tensor
    generated: list[list[int]]


class Refused(Exception):  # noqa: N818
    """The server doesn't serve this checkpoint, and its own words for why."""


class Vllm:
    """One vLLM process, which serves checkpoint after checkpoint; started when first asked."""

    def __init__(self, python: str, scratch: Path) -> None:
        self.python = python
        self._scratch = scratch
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def serve(self, folder: Path, dtype: str = "float32", new_tokens: int = 8) -> Served:
        """What it predicts and generates for the folder's prompts. Raises Refused."""
        output = self._scratch / "logprobs.safetensors"
        job = {"model": str(folder), "dtype": dtype, "prompts": prompts(folder), "new_tokens": new_tokens}
        said = self._ask({**job, "output": str(output)})
        if "refused" in said:
            # What a failed start leaves behind in the process is nothing to start the next engine on.
            self.stop()
            raise Refused(said["refused"])
        return Served(load_file(output)["logprobs"], said["generated"])

    def stop(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @staticmethod
    def environment() -> dict[str, str]:
        """Its environment variables: ours, but for what points Python at our packages."""
        return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            line = process.stdout.readline() if selector.select(PATIENCE) else ""
        if not line:
            self.stop()
            raise AssertionError(f"vLLM gave no answer for {job['model']}; its last words:\n{self._log()[-2000:]}")
        return json.loads(line)

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            script = Path(__file__).with_name("serve_vllm.py")
            with (self._scratch / "stderr.txt").open("w") as log:
                self._process = subprocess.Popen(
                    [self.python, str(script)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=self.environment(),
                )
        return self._process

    def _log(self) -> str:
        return (self._scratch / "stderr.txt").read_text(errors="replace")


def linear_tensor_there(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    input_scale: torch.Tensor,
    bias: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """The output [..., N] of `ops.linear_tensor` with a static scale, but saturated at -128, and ours at -127."""
    del backend
    activations = (x.float() / input_scale.float()).round().clamp(-128, 127)
    # Sums of at most 2**53 in float64: exact.
    sums = (activations.double() @ codes.double().t()).float()
    out = sums * input_scale.float() * scale.float().view(-1)
    return (out if bias is None else out + bias.float()).to(x.dtype)


class Ours:
    """Our log-probabilities of folders, each computed once for a dtype.

    Activations beyond a static int8 range become the code -127 in quantkit, and -128 in compressed-tensors and vLLM.
    That is the one difference that we know of. To compare all the rest, both sides saturate alike here, unless
    `saturation` is False.
    """

    def __init__(self, saturation: bool = True) -> None:
        self._saturation = saturation
        self._known: dict[tuple[Path, str], torch.Tensor] = {}

    def logprobs(self, folder: Path, dtype: str) -> torch.Tensor:
        """[B, T - 1, V] in float32 of the folder's prompts, by quantkit."""
        if (folder, dtype) not in self._known:
            logits = self._logits(folder, dtype, torch.tensor(prompts(folder)))
            self._known[folder, dtype] = logits[:, :-1].log_softmax(-1)
        return self._known[folder, dtype]

    def agreement(self, served: Served, compressed: Path, base: Path, dtype: str) -> Agreement:
        """How the server's predictions of a compressed checkpoint compare with ours, `base` being its float model."""
        return compare(
            served.logprobs,
            self.logprobs(compressed, dtype),
            self.logprobs(compressed, "float32"),
            self.logprobs(base, "float32"),
            self.logprobs(base, dtype),
        )

    def regret(self, served: Served, folder: Path, dtype: str) -> torch.Tensor:
        """By how many nats each generated token [B, new] falls short of our likeliest one after the same tokens."""
        asked, generated = prompts(folder), torch.tensor(served.generated)
        logits = self._logits(folder, dtype, torch.cat([torch.tensor(asked), generated], 1))
        following = logits[:, len(asked[0]) - 1 : -1].log_softmax(-1)
        return following.amax(-1) - following.gather(-1, generated[..., None]).squeeze(-1)

    def _logits(self, folder: Path, dtype: str, ids: torch.Tensor) -> torch.Tensor:
        model = quantkit.load(folder, dtype=dtype)
        product = linear_tensor_there if self._saturation else ops.linear_tensor
        with torch.no_grad(), mock.patch.object(ops, "linear_tensor", product):
            return model(ids).logits.float()
