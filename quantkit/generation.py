"""complete(): text after a prompt, for a quick look at a checkpoint."""

from pathlib import Path

import torch

from quantkit.checkpoint import Hub, load_tokenizer
from quantkit.errors import CheckpointError, DataError
from quantkit.loading import load


def complete(
    checkpoint: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    backend: str = "auto",
    hub: Hub | None = None,
) -> str:
    """The prompt and what the model says after it; with temperature 0 the likeliest token each time.

    Raises:
        CheckpointError: the model has no tokenizer.
        DataError: the prompt has no token that the tokenizer knows.
    """
    hub = hub or Hub()
    words = {**hub.download, "trust_remote_code": hub.trust_remote_code}
    tokenizer = load_tokenizer(checkpoint, **words)
    if tokenizer is None:
        raise CheckpointError(
            f"{checkpoint} has no tokenizer, so a prompt means nothing to it; copy one into its folder"
        )
    model = load(checkpoint, device=device, backend=backend, **words)
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if ids["input_ids"].numel() == 0:
        raise DataError(f"the prompt {prompt!r} has no token that the tokenizer of {checkpoint} knows; give another")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.inference_mode():
        out = model.generate(**ids, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
    text: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return text
