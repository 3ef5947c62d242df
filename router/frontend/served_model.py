"""The model that is served, as far as requests depend on it: names, limits, ids, defaults of sampling."""

from __future__ import annotations

from collections.abc import Sequence

from baton import errors
from baton.errors import quoted
from baton.types import SamplingParams
from router.cluster.membership import Membership
from router.text.model_files import ModelFacts, defaults
from router.text.tokenizer import Tokenizer


class ServedModel:
    """What the model's folder says, and what nodes say once they are known."""

    def __init__(
        self, membership: Membership, facts: ModelFacts, tokenizer: Tokenizer | None, names: tuple[str, ...]
    ) -> None:
        """``names``: empty for the name that the nodes say."""
        self._membership = membership
        self._facts = facts
        self._tokenizer = tokenizer
        self._names = names
        # As in vLLM, the tokenizer's end of sequence stops whether or not generation_config.json lists it.
        own_eos = () if tokenizer is None or tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self._eos_token_ids = tuple(dict.fromkeys((*facts.eos_token_ids, *own_eos)))

    @property
    def name(self) -> str:
        """As answers have it; empty while no name is known."""
        return next(iter(self.names), "")

    @property
    def names(self) -> tuple[str, ...]:
        reference = self._membership.reference
        return self._names or ((reference.model.name,) if reference and reference.model.name else ())

    @property
    def sampling(self) -> SamplingParams:
        """The defaults of generation_config.json."""
        return self._facts.sampling

    @property
    def stated_sampling(self) -> dict[str, float]:
        """Those of the defaults that differ from the API's own."""
        return defaults(self._facts.sampling)

    @property
    def max_tokens(self) -> int | None:
        """Prompt and output together; None while no node and no folder has given it."""
        reference = self._membership.reference
        bounds = [
            reference.model.max_model_tokens if reference else self._facts.max_model_tokens,
            self._membership.capacity_tokens,
        ]
        return min((b for b in bounds if b is not None), default=None)

    @property
    def vocab_size(self) -> int | None:
        """The tokenizer's while no node is known."""
        reference = self._membership.reference
        if reference is not None:
            return reference.model.vocab_size
        return None if self._tokenizer is None else self._tokenizer.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer; some may lie beyond the vocabulary."""
        return self._eos_token_ids

    def check_name(self, name: str) -> None:
        """Raises UnknownModel for a name that is none of the model's."""
        if name not in self.names:
            has = " and ".join(map(quoted, self.names)) or "no model yet"
            raise errors.UnknownModel(f"the model {quoted(name)} does not exist; this server has {has}", param="model")

    def check_ids(self, param: str, ids: Sequence[int]) -> None:
        """Every id that a node would look up must be in the vocabulary."""
        vocab_size = self.vocab_size
        if vocab_size is None:
            return
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise errors.InvalidRequest(
                    f"token id {token_id} in {param} is out of range, expected 0 to {vocab_size - 1}", param=param
                )


def too_long(limit: int, length: str, param: str) -> errors.PromptTooLong:
    return errors.PromptTooLong(
        f"this model's maximum context length is {limit} tokens, but the prompt alone has {length}; shorten the prompt",
        param=param,
    )
