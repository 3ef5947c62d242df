"""A process that builds grammars that are new: `router/grammar/check.py` starts it by this file's path.

Its argument is the folder that the package `baton` is in. It reads a line of JSON with the tokenizer's file and the
limits, then one with each grammar; builds it, follows it for a few tokens, and writes why it is refused, or null. What
takes too long or too much memory ends the process, in whatever call of the library it is.
"""

import json
import os
import resource
import signal
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer


def main() -> None:
    # The router's streams go first.
    os.nice(5)
    told = json.loads(sys.stdin.readline())
    resource.setrlimit(resource.RLIMIT_AS, (told["max_bytes"], told["max_bytes"]))
    # Behind all others: the folder may have anything in it.
    sys.path.append(sys.argv[1])
    from baton.grammar_tokenizer import readable

    with open(told["tokenizer"], encoding="utf-8") as file:
        text = file.read()
    try:
        tokenizer = LLTokenizer(readable(text))
    except ValueError as error:
        print(json.dumps(str(error)), flush=True)  # noqa: T201
        return
    limits = LLParserLimits(**told["limits"])
    print("null", flush=True)  # noqa: T201 (the answer)
    for line in sys.stdin:
        # The default action of the signal ends the process.
        signal.setitimer(signal.ITIMER_REAL, told["limit_s"])
        matcher = LLMatcher(tokenizer, json.loads(line), log_level=0, limits=limits)
        why = refusal(matcher, told["num_steps"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(why), flush=True)  # noqa: T201


def refusal(matcher: LLMatcher, num_steps: int) -> str | None:
    # Some limits show with the first tokens only.
    for _ in range(num_steps):
        if matcher.is_stopped():
            break
        allowed = int.from_bytes(matcher.compute_bitmask(), "little")
        if not (allowed or matcher.is_error()):
            return "the model has no token that it allows"
        matcher.consume_token((allowed & -allowed).bit_length() - 1)
    return matcher.get_error() or None


if __name__ == "__main__":
    main()
