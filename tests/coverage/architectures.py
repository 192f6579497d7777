"""Every entry of transformers' table of causal language models, and those that have no tiny model."""

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

UNBUILDABLE: dict[str, str] = {
    "gemma3n": "its vision tower needs timm (gemma3n_text is the same language model)",
    "gemma4_assistant": "it drafts for another model: its forward takes that model's keys, no tokens",
    "gemma4_unified_assistant": "it drafts for another model: its forward takes that model's keys, no tokens",
    "musicgen": "its class takes the decoder's configuration, and AutoModelForCausalLM passes the whole one",
    "musicgen_melody": "its class takes the decoder's configuration, and AutoModelForCausalLM passes the whole one",
}
"""Model type -> why there is no tiny model."""

ENTRIES: list[str] = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
BUILDABLE: list[str] = [entry for entry in ENTRIES if entry not in UNBUILDABLE]
