"""The limits of grammars, which router and nodes must agree on: what one builds the other does. No dependencies."""

from __future__ import annotations

from collections.abc import Mapping

# By llguidance's names. One token's mask: 100,000 units of the lexer's fuel and 20,000 of the parser's items are 10 ms.
LIMITS: Mapping[str, int | bool] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    # 2 KB each.
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "max_items_in_row": 2_000,
    # Errors are short and tell nothing of the parser's state.
    "verbose_errors": False,
}
