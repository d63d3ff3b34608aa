"""What an expression of PromQL asks for: the names of metrics and of recorded rules in it, without a Prometheus.

(PYTEST_DONT_REWRITE: nothing is asserted here.)
"""

import re

_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"')
_MATCHERS = re.compile(r"\{[^}]*\}")
_RANGES = re.compile(r"\[[^\]]*\]")
# Labels in parentheses, after the words that take them.
_LABELS = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_NAME = re.compile(r"(?<![\w:.])([a-zA-Z_:][\w:]*)(?!\s*\()(?![\w:])")
_WORDS = frozenset({"and", "or", "unless", "bool", "offset", "by", "without", "on", "ignoring", "inf", "nan"})


def metrics_of(expression: str) -> set[str]:
    """Return every metric and every recorded rule that the expression names."""
    rest = expression
    for part in (_STRINGS, _MATCHERS, _RANGES, _LABELS):
        rest = part.sub(" ", rest)
    return {name for name in _NAME.findall(rest) if name.lower() not in _WORDS}
