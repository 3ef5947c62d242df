"""A process that builds grammars that are new: `router/grammar_check.py` starts it by this file's path.

Reads a line of JSON with the tokenizer's file and the limits, then one with each grammar; writes why it is refused, or
null. What takes too long or too much memory ends the process, in whatever call of the library it is.
"""

import json
import resource
import signal
import sys


def main() -> None:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    told = json.loads(sys.stdin.readline())
    resource.setrlimit(resource.RLIMIT_AS, (told["max_bytes"], told["max_bytes"]))
    with open(told["tokenizer"], encoding="utf-8") as file:
        text = file.read()
    try:
        tokenizer = LLTokenizer(text)
    except ValueError as error:
        print(json.dumps(str(error)), flush=True)  # noqa: T201
        return
    limits = LLParserLimits(**told["limits"])
    print("null", flush=True)  # noqa: T201 (the answer)
    for line in sys.stdin:
        # The default action of the signal ends the process.
        signal.setitimer(signal.ITIMER_REAL, told["limit_s"])
        matcher = LLMatcher(tokenizer, json.loads(line), log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(matcher.get_error() or None), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
