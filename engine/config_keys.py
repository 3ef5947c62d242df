"""The fields of a config.json that do not affect the result, with reasons. All others are read, off, or refused by
name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from baton.errors import quoted
from baton.fields import Fields

# Fields that do not change what the model computes, by the reason.
_HARMLESS_BY_REASON: Mapping[str, tuple[str, ...]] = {
    "notes about the file, and options for transformers itself": (
        *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "transformers.js_config"),
        *("_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset"),
        *("attn_implementation", "_flash_attn_2_enabled", "_experts_implementation", "_from_model_config"),
        *("use_cache", "return_dict", "use_return_dict", "output_attentions", "output_hidden_states", "torchscript"),
        *("tf_legacy_loss", "is_llama_config", "model_name", "neuron", "chunk_size_feed_forward"),
    ),
    "tokens and texts: the tokenizer's files and generation_config.json decide": (
        *("bos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id"),
        *("decoder_start_token_id", "tokenizer_class", "prefix", "tokenizer_model_max_length"),
        *("tokenizer_padding_side", "model_max_length", "max_sequence_length"),
    ),
    "training, and how its machines shared the weights": (
        *("initializer_range", "attention_dropout", "hidden_dropout", "hidden_dropout_prob", "classifier_dropout"),
        *("attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop", "neftune_noise_alpha"),
        *("gradient_checkpointing", "pretraining_tp"),
    ),
    "heads for other tasks": (
        *("num_labels", "id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params"),
    ),
    "defaults of generation, which is the request's business": (
        *("do_sample", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
        *("diversity_penalty", "num_beams", "num_beam_groups", "num_return_sequences", "max_length", "min_length"),
        *("max_new_tokens", "early_stopping", "output_scores", "return_dict_in_generate", "remove_invalid_values"),
    ),
}
_HARMLESS = frozenset(name for names in _HARMLESS_BY_REASON.values() for name in names)
_HARMLESS_PREFIXES = ("unsloth_",)
# Of factors it is 1 that changes nothing, and not 0.
_FACTORS = frozenset({
    "embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "scale_emb", "rotary_pct",
    "rope_scaling_factor",
})  # fmt: skip
# Long messages are cut at the end, where the advice stands.
_SHOWN = 3


def refuse_unknown(fields: Fields, *, harmless: frozenset[str] = _HARMLESS) -> None:
    """Raise for fields that were never read, unless they are ``harmless`` or switch something off."""
    unknown = {key: value for key, value in fields.unread().items() if not _is_harmless(key, value, harmless)}
    if unknown:
        shown = ", ".join(f"{quoted(key)}: {quoted(value)}" for key, value in list(unknown.items())[:_SHOWN])
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise fields.refusal(
            f"{shown}{more} may change what the model computes, and Baton does not know how: expected fields that it "
            "knows. If they change nothing, make a copy of the folder (cp -rL FOLDER COPY), take them out of its "
            "config.json, and serve that"
        )


def _is_harmless(key: str, value: Any, harmless: frozenset[str]) -> bool:
    if key in _FACTORS:
        return value is None or value == 1
    # null, false, 0, "", [], {}: off
    return key in harmless or key.startswith(_HARMLESS_PREFIXES) or not value
