"""vLLM's CPU build as a witness: it loads checkpoints one after the other and says what it predicts.

Run by the Python of vLLM's environment, which has no quantkit. A line of JSON in, a line of JSON out:

    {"model": DIR, "dtype": "float32", "prompts": [[ids], ...], "new_tokens": 8, "output": FILE}

The answer has "generated", the new token ids of each prompt, and FILE holds "logprobs" [B, T - 1, V]: entry t is what
was predicted for token t + 1 of the prompt. What vLLM can't serve is answered with "refused", its own message.
"""

import gc
import json
import os
import sys
from typing import Any

# An engine in this process, on one core's worth of cache, that asks nothing of the network.
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """What vLLM generates after the prompts of one job; writes the log-probabilities beside."""
    import torch
    from safetensors.torch import save_file
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=job["model"],
        dtype=job["dtype"],
        max_model_len=128,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_num_batched_tokens=256,
        max_num_seqs=4,
        max_logprobs=-1,
        seed=0,
    )
    sampling = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, prompt_logprobs=-1)
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    rows = [[_row(position) for position in output.prompt_logprobs[1:]] for output in outputs]
    save_file({"logprobs": torch.tensor(rows, dtype=torch.float32)}, job["output"])
    return {"generated": [list(output.outputs[0].token_ids) for output in outputs]}


def _row(position: dict[int, Any]) -> list[float]:
    """The log-probability of every token of the vocabulary, in order."""
    return [position[token].logprob for token in range(len(position))]


def main() -> None:
    os.environ.update(SETTINGS)
    # vLLM and its libraries print: what they say goes to stderr, and stdout is for answers alone.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            said = answer(json.loads(line))
        except Exception as error:
            said = {"refused": f"{type(error).__name__}: {error}"}
        gc.collect()
        answers.write(json.dumps(said) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
