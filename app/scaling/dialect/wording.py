"""Turns a search as people type it into MariaDB's boolean mode, which neither knows word forms nor forgives a sign.

PostgreSQL's `websearch_to_tsquery` is the measure: all words must be there, "or" parts alternatives, a minus forbids,
quotes make a phrase, and the commonest words of the language count for nothing. Word forms are asked for one by one.
"""

import re

from snowballstemmer import stemmer

_TERM = re.compile(r'(-?)(?:"([^"]*)"|(\S+))')
_WORD = re.compile(r"\w+")
_STEMMER = stemmer("english")
# The regular endings of nouns and verbs, on the stem that Snowball finds: candl-e, bench-es, fold-ing.
_ENDINGS = ("", "s", "e", "es", "ed", "ing")
# As PostgreSQL's english.stop; a search for them alone finds nothing.
_STOP_LIST = """
    i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself
    it its itself they them their theirs themselves what which who whom this that these those am is are was were be been
    being have has had having do does did doing a an the and but if or because as until while of at by for with about
    against between into through during before after above below to from up down in out on off over under again further
    then once here there when where why how all any both each few more most other some such no nor not only own same so
    than too very s t can will just don should now
"""
_STOP_WORDS = frozenset(_STOP_LIST.split())


def boolean_query(text: str) -> str:
    """Return `text` for MATCH … AGAINST (… IN BOOLEAN MODE); empty if nothing of it counts."""
    alternatives: list[list[str]] = [[]]
    for minus, phrase, word in _TERM.findall(text):
        if word.lower() == "or" and not minus:
            alternatives.append([])
        else:
            alternatives[-1] += _terms(minus, phrase, word)
    groups = [" ".join(terms) for terms in alternatives if terms]
    return groups[0] if len(groups) == 1 else " ".join(f"({group})" for group in groups)


def _terms(minus: str, phrase: str, word: str) -> list[str]:
    sign = "-" if minus else "+"
    if phrase:
        words = _WORD.findall(phrase.lower())
        return [f'{sign}"{" ".join(words)}"'] if words else []
    return [f"{sign}({' '.join(_forms(each))})" for each in _WORD.findall(word.lower()) if each not in _STOP_WORDS]


def _forms(word: str) -> list[str]:
    stem: str = _STEMMER.stemWord(word)
    forms = [word, *(f"{stem}{ending}" for ending in _ENDINGS)]
    if stem.endswith("i"):
        forms.append(f"{stem[:-1]}y")
    return list(dict.fromkeys(forms))
