"""Reads a config.json field by field, checks types and ranges, and refuses what nobody read and may change numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from baton.errors import UnsupportedModel, quoted

MAX_INT = 2**31 - 1

# Fields that do not change what the model computes, by the reason.
_HARMLESS_BY_REASON: Mapping[str, tuple[str, ...]] = {
    "notes of whoever saved the file, and how transformers is to run it": (
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


class Fields:
    """One JSON object of a config; every question marks its field as read."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self._source = source
        self._read: set[str] = set()

    def get(self, key: str) -> Any:
        """As it is; None where there is none."""
        self._read.add(key)
        return self._values.get(key)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def within(self, key: str) -> str:
        """The source of an object in this one."""
        return f"{self._source}: {key}"

    def fault(self, key: str, expected: str) -> UnsupportedModel:
        return self.refusal(f"{key} is {quoted(self._values.get(key))}, expected {expected}")

    def refusal(self, text: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self._source}: {text}")

    def integer(
        self, key: str, default: int | None = None, *, least: int = 1, most: int = MAX_INT, nullable: bool = False
    ) -> int:
        """``default`` counts where the field is absent, or null and ``nullable``; without one it must be there."""
        value = self._value(key, default, nullable)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.fault(key, f"an integer from {least} to {most}" + " or null" * nullable)
        return value

    def number(
        self, key: str, default: float | None = None, *, least: float, most: float, nullable: bool = False
    ) -> float:
        value = self._value(key, default, nullable)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise self.fault(key, f"a number from {least:g} to {most:g}" + " or null" * nullable)
        return float(value)

    def optional_number(self, key: str, *, least: float, most: float) -> float | None:
        return None if self.get(key) is None else self.number(key, least=least, most=most)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default, False)
        if not isinstance(value, bool):
            raise self.fault(key, "true or false")
        return value

    def text(self, key: str) -> str | None:
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self.fault(key, "a string")
        return value

    def texts(self, key: str) -> list[str]:
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.fault(key, "a list of strings")
        return value

    def numbers(self, key: str, count: int, *, most: float) -> tuple[float, ...]:
        """Positive ones."""
        value = self.get(key)
        expected = f"a list of {count} positive numbers up to {most:g}"
        if not isinstance(value, list) or len(value) != count:
            raise self.fault(key, expected)
        for one in value:
            if isinstance(one, bool) or not isinstance(one, int | float) or not 0 < one <= most:
                raise self.fault(key, expected)
        return tuple(map(float, value))

    def fields(self, key: str) -> Mapping[str, Any]:
        value = self.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.fault(key, "an object or null")
        return value

    def refuse_unread(self, *, harmless: frozenset[str] = _HARMLESS) -> None:
        """Raise for fields that were not asked for, unless they are ``harmless`` or say that something is off."""
        unknown = [key for key in self._values if key not in self._read and not self._is_harmless(key, harmless)]
        if unknown:
            shown = ", ".join(f"{quoted(key)}: {quoted(self._values[key])}" for key in unknown[:5])
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise self.refusal(
                f"{shown}{more} may change what the model computes, and Baton does not know how: expected fields that "
                "it knows; remove from the file what changes nothing"
            )

    def _is_harmless(self, key: str, harmless: frozenset[str]) -> bool:
        value = self._values[key]
        if key in _FACTORS:
            return value is None or value == 1
        # null, false, 0, "", [], {}: off
        return key in harmless or key.startswith(_HARMLESS_PREFIXES) or not value

    def _value(self, key: str, default: Any, nullable: bool) -> Any:
        value = self.get(key)
        is_absent = key not in self._values or (value is None and nullable)
        return default if is_absent else value
