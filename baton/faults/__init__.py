"""Faults on purpose: a schedule says what strikes where and when, and the same schedule strikes the same again."""
