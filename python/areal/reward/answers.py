"""What a text gives as its final answer, and plain numbers as exact fractions. No sympy: most answers need no more than this.

The answer of a completion is, in this order, what its last ``\\boxed{}`` or its last ``####`` holds (the later of the two), what follows
its last "the answer is", or its last expression. Text that only leads there is never looked at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_TAIL = 2000  # characters in which the last expression is looked for
_LONGEST_SEPARATOR = 40
_BOXES_TRIED = 4  # unfinished boxes before the text counts as one without
_ROUNDED_DECIMALS = 6  # a decimal of at least as many places stands for the fraction that it rounds

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-z])\s*(?:\{|(?P<bare>[^\s{}$\\]+))")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:,|;|and|or|,\s*and|,\s*or|\\text\{\s*(?:and|or)\s*\})?[\s$]*")
_MATH = r"\$\$(?:(?!\$\$).)+\$\$|\\\[(?:(?!\\[\[\]]).)+\\\]|\\\((?:(?!\\[()]).)+\\\)|\$(?=\S)(?:\\.|[^$\n\\])+?(?<=\S)\$(?!\d)"
_DELIMITED = re.compile(_MATH, re.DOTALL)
_EXPRESSION = re.compile(rf"{_MATH}|(?<![\w.])-?\d+\s+\d+/\d+(?![\w/])|\S*\d\S*(?:\s?%|\s?percent\b)?|\S*\\[a-zA-Z]\S*", re.DOTALL)
_NUMBER = re.compile(r"(?:(?<![\w)\]}.])-)?(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?(?:/\d+)?%?")
_PHRASE = re.compile(r"\banswers?\b(?:\s+\w+){0,5}?[\s*_]*(?:\bis\b|\bare\b|:|=)[\s:*_]*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n|$")
_ENDS_NUMBER = re.compile(r"\s+[A-Za-z]{2,}|\s*[,;(]|\s*$")
_EQUALS = re.compile(r"(?<![<>!\\])=(?!=)")
_WORD = r"(?<![\\A-Za-z])(?!(?:or|and)\b)[A-Za-z]{2,}"
_PROSE = re.compile(rf"{_WORD}[\s,]+{_WORD}|{_WORD}\s+[-$\\]*\d")

_WRAPPER = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf)?|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\\[,!;:]|\{\}")
_ASCII_PI = re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])")
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")  # GSM8K's notes: 48+24=<<48+24=72>>72
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°")
_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": "\\times ", "π": "\\pi ", "√": "\\sqrt ", "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ", "∪": "\\cup "}
)
_CURRENCY = str.maketrans("", "", "$€£¥₹*`")

_MULTIPLIERS = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NOT_UNITS = "or|and|to|out|times|plus|minus|over|divided|mod|pi|sqrt|sin|cos|tan|log|ln|exp|frac|dozen|half|infty|inf"
_PLAIN = re.compile(
    rf"""(?:\\approx|about|approximately|~)?\s*
    (?P<sign>[-+]?)\s*
    (?: (?P<integer>\d{{1,3}}(?:,\d{{3}})+ | \d{{1,3}}(?:[ ]\d{{3}})+ | \d{{1,300}})? (?P<decimals>\.\d{{0,300}})?
      | (?:(?P<whole>\d{{1,300}})\s+)? (?P<n>\d{{1,300}})\s*/\s*(?P<d>\d{{1,300}})
      | (?P<whole2>\d{{1,300}})?\s* \\frac\s*
        (?: \{{\s*(?P<n2>-?\d{{1,300}})\s*\}}\s*\{{\s*(?P<d2>\d{{1,300}})\s*\}} | (?P<n3>\d)(?P<d3>\d) )
    )
    (?: e(?P<e>[-+]?\d{{1,3}}) | \s*(?:\\times|\\cdot|[*x])\s*10\s*(?:\^|\*\*)\s*(?:\{{\s*(?P<e2>[-+]?\d{{1,3}})\s*\}}|(?P<e3>[-+]?\d)) )?
    \s*(?P<percent>%|percent(?:age)?\b|pct\b)?
    \s*(?P<multiplier>{"|".join(_MULTIPLIERS)})?
    \s*(?:(?!(?:{_NOT_UNITS})\b)[A-Za-z]{{2,}}(?:\s*\^\s*\{{?\d\}}?)?(?:\s+|/|\b))*
    \s*\.?""",
    re.VERBOSE | re.IGNORECASE,
)  # fmt: skip
_BASED = re.compile(r"(\d[0-9A-Fa-f]*|[0-9A-F]+(?=_16))_(\d+)")
_REPEATING = re.compile(r"(?P<sign>-?)(?P<integer>\d{0,300})\.(?P<decimals>\d{0,300})\\(?:overline|bar)\s*\{?(?P<period>\d{1,300})\}?")
_SHORT_WORDS = "yes|no|odd"
_LETTER = re.compile(r"(?:option|choice|answer)?\s*\(?\s*([A-J])(?:\s*\)|[.:](?=\s|$)|(?=\s*$))", re.IGNORECASE)
_SAID_LETTER = re.compile(r"\W{0,8}?(?:option|choice)?\s*\(?\s*([A-J])(?![A-Za-z'])")
_BRACKETED_LETTER = re.compile(r"\(([A-J])\)")
_LAST_LETTER = re.compile(r"(?:^|\n|\b(?:option|choice) (?:is )?)\W*([A-J])\W*$")


@dataclass(frozen=True, slots=True)
class PlainNumber:
    """``value`` is without the percent sign: 50% has value 50. ``decimals`` = digits written behind the point."""

    value: Fraction
    percent: bool
    decimals: int


def final_answer(text: str) -> str | None:
    """The final answer as it was written (see above), without delimiters; None where there is no expression at all."""
    marked = _marked(text)
    if marked is not None:
        return marked or None
    return _after_phrase(text) or last_expression(text)


def _marked(text: str) -> str | None:
    box, hashes = _last_boxes(text), _after_hashes(text)
    if hashes is not None and (box is None or hashes[0] > box[0]):
        return hashes[1]
    return box[1] if box else None


def _box(text: str, before: int) -> tuple[int, int, str] | None:
    """Begin, end and content of the last complete box that begins before ``before``."""
    for _ in range(_BOXES_TRIED):
        begin = max(text.rfind("\\boxed", 0, before), text.rfind("\\fbox", 0, before))
        if begin < 0:
            return None
        box = _BOX.match(text, begin)
        if box is not None and box["bare"]:
            return begin, box.end(), box["bare"]
        depth = 0
        for brace in _BRACE.finditer(text, box.end() - 1) if box else ():
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if not depth and box:
                return begin, brace.end(), text[box.end() : brace.start()]
        before = begin
    return None


def _last_boxes(text: str) -> tuple[int, str] | None:
    """Where the last box begins, and its content; with the boxes that only a comma or an "and" keeps apart from it, as a list."""
    last = _box(text, len(text)) if "box" in text else None
    if last is None:
        return None
    begin, contents = last[0], [strip_delimiters(last[2])]
    while (earlier := _box(text, begin)) is not None and begin - earlier[1] < _LONGEST_SEPARATOR:
        if not _BETWEEN_BOXES.fullmatch(text, earlier[1], begin):
            break
        begin = earlier[0]
        contents.insert(0, strip_delimiters(earlier[2]))
    return last[0], ", ".join(dict.fromkeys(contents))


def _after_hashes(text: str) -> tuple[int, str] | None:
    """Where the last ``####`` stands and its line; a heading of Markdown, which more text follows, does not count."""
    begin = text.rfind("####")
    if begin < 0:
        return None
    line, _, rest = text[begin + 4 :].strip().partition("\n")
    line = strip_delimiters(_PHRASE.sub("", line[:_TAIL], count=1))
    if not line or (rest.strip() and plain_number(line) is None and not _DELIMITED.search(line)):
        return None
    return begin, line


def _after_phrase(text: str) -> str | None:
    """What the last "the answer is" says, when an expression follows, or words that end the text."""
    phrases = list(_PHRASE.finditer(text, max(0, len(text) - _TAIL)))
    for phrase in reversed(phrases):
        end = _SENTENCE_END.search(text, phrase.end())
        assert end is not None
        said = text[phrase.end() : end.start()].strip()
        if delimited := _DELIMITED.match(text, phrase.end()):
            return strip_delimiters(delimited[0])
        if plain_number(said) is not None:
            return strip_delimiters(said)
        if said and (said[0] in "-+([{\\$.€£" or said[0].isdigit()) and not _PROSE.search(said):
            return strip_delimiters(said)
        said = said.lstrip("$€£")
        if (number := _NUMBER.match(said)) and _ENDS_NUMBER.match(said, number.end()):
            return number[0]
        if said and not text[end.end() :].strip():
            return last_expression(said) or strip_delimiters(said)
    return None


def last_expression(text: str) -> str | None:
    """The last delimited mathematics or token with a digit; what stands behind its last equals sign."""
    last = None
    for match in _EXPRESSION.finditer(_CALCULATOR.sub("", text[-_TAIL:])):
        if last is None or any(c.isdigit() for c in match[0]) or not any(c.isdigit() for c in last):
            last = match[0]
    if last is None:
        return None
    if delimited := _DELIMITED.search(last):
        return strip_delimiters(delimited[0])
    token = _EQUALS.split(strip_delimiters(_trim(last)))[-1].strip()
    if plain_number(token) is None and re.search(r"(?<!\\)\b[A-Za-z]{2,}", token):
        numbers = _NUMBER.findall(token)
        return numbers[-1] if numbers else token
    return token


def _trim(token: str) -> str:
    """Without the punctuation of the sentence that it stands in."""
    while True:
        shorter = token.strip("*_`\"'.,;:!?" if not re.match(r"[-$]*\.\d", token) else "*_`\"',;:!?")
        for opening, closing in ("()", "[]", "{}"):
            missing = shorter.count(opening) - shorter.count(closing)
            if missing < 0 and shorter.endswith(closing) and not shorter.endswith("\\" + closing):
                shorter = shorter[:-1]
            elif missing > 0 and shorter.startswith(opening):
                shorter = shorter[1:]
        if shorter == token:
            return token
        token = shorter


def strip_delimiters(text: str) -> str:
    """Without bold marks, ``$``, ``\\(`` or ``\\[`` around all of it, and without a full stop at its end."""
    text = text.strip().strip("*_` ").rstrip()
    if _DELIMITED.fullmatch(text):
        text = text[2:-2] if text.startswith(("$$", "\\")) else text[1:-1]
    text = re.sub(r"(?<!\\)\\$", "", text.strip()).strip()  # of a space that was escaped
    return text.removesuffix(".").rstrip() if not text.endswith(("..", "\\.")) else text


def is_prose(text: str) -> bool:
    """Several words, or a word before a number, outside of commands: the expression is somewhere in it."""
    return _PROSE.search(_unwrapped(text)) is not None


def _unwrapped(text: str) -> str:
    text = text.translate(_UNICODE)
    if "\\" in text or "{" in text:
        text = _WRAPPER.sub(r" \1 ", _SPACING.sub("", text)).replace("\\%", "%").replace("\\$", "$").replace("\\ ", " ")
        text = re.sub(r"\\[dtc]frac", r"\\frac", text).replace("{,}", ",")
    return text


def plain_number(text: str) -> PlainNumber | None:
    """An integer, decimal, fraction or mixed number, with currency, percent sign and unit if any; None if it is anything else.

    Units are dropped, not compared: of 18 cm the value is 18.
    """
    text = text.strip()
    if text.isascii() and text.isdigit() and len(text) <= 300:
        return PlainNumber(Fraction(int(text)), False, 0)
    if len(text) > 1000:
        return None
    if repeating := _REPEATING.fullmatch(text):
        return PlainNumber(_repeating(repeating.groupdict()), False, 0)
    match = _PLAIN.fullmatch(_DEGREES.sub("", _unwrapped(text)).translate(_CURRENCY).strip())
    if match is None:
        return None
    part = match.groupdict()
    digits = (part["decimals"] or "").rstrip(".")[1:]
    if numerator := part["n"] or part["n2"] or part["n3"]:
        denominator = int(part["d"] or part["d2"] or part["d3"])
        if not denominator:
            return None
        value = int(part["whole"] or part["whole2"] or 0) + Fraction(int(numerator), denominator)
    elif part["integer"] or digits:
        integer = re.sub("[ ,]", "", part["integer"] or "0")
        value = Fraction(int(integer + digits), 10 ** len(digits))
    else:
        return None
    value *= _MULTIPLIERS.get((part["multiplier"] or "").lower(), 1)
    if exponent := part["e"] or part["e2"] or part["e3"]:
        value *= Fraction(10) ** int(exponent)
    return PlainNumber(-value if part["sign"] == "-" else value, part["percent"] is not None, len(digits))


def _repeating(part: dict[str, str]) -> Fraction:
    """0.1\\overline{6} is 1/6."""
    plain, period = part["decimals"], part["period"]
    value = Fraction(int(part["integer"] + plain or "0") + Fraction(int(period), 10 ** len(period) - 1)) / 10 ** len(plain)
    return -value if part["sign"] else value


def same_base(answer: str, reference: str) -> bool | None:
    """Of numbers with a base, 2516_8: the same digits, and the same base or none; None where neither has one."""
    texts = [re.sub(r"[\s{}]", "", _unwrapped(strip_delimiters(text))) for text in (answer, reference)]
    mine, theirs = map(_BASED.fullmatch, texts)
    if theirs is None:
        return None if mine is None or mine[2] == "10" else False
    return texts[0] == theirs[1] if mine is None else mine.groups() == theirs.groups()


def same_number(a: PlainNumber, b: PlainNumber) -> bool:
    """Equal as fractions; 50% is 0.5, and also 50 when that has no percent sign; 0.333333 stands for 1/3."""
    if a.percent == b.percent:
        return _same_value(a.value, b.value, max(a.decimals, b.decimals))
    percent, other = (a, b) if a.percent else (b, a)
    return percent.value == other.value or _same_value(percent.value / 100, other.value, other.decimals)


def _same_value(a: Fraction, b: Fraction, decimals: int) -> bool:
    if a == b or decimals < _ROUNDED_DECIMALS:
        return a == b
    rounded = round(a, _ROUNDED_DECIMALS)
    return rounded == round(b, _ROUNDED_DECIMALS) != 0


def choice_of(reference: str) -> str | None:
    """The letter of a reference that is a choice: B, (B), \\text{(B)}, B. 12."""
    match = _LETTER.match(_unwrapped(reference).strip(" *$"))
    return match[1] if match and match[1].isupper() else None


def chosen(text: str) -> str | None:
    """The letter that a completion chooses: where its final answer is marked the one there, else its last (B), or B at its very end."""
    marked = _marked(text)
    if marked is not None:
        match = _LETTER.match(_unwrapped(marked).strip(" *$"))
        return match[1].upper() if match else None
    for phrase in reversed(list(_PHRASE.finditer(text, max(0, len(text) - _TAIL)))):
        if match := _SAID_LETTER.match(_unwrapped(text[phrase.end() :])):
            return match[1]
    letters = _BRACKETED_LETTER.findall(text[-_TAIL:])
    if letters:
        return str(letters[-1])
    last = _LAST_LETTER.search(text.rstrip()[-200:])
    return last[1] if last else None


def same_text(a: str, b: str) -> bool:
    """The same but for case, spacing, delimiters and text commands."""
    return bool(b) and (a == b or _squash(a) == _squash(b) != "")


def _squash(text: str) -> str:
    text = strip_delimiters(_unwrapped(text).translate(_CURRENCY)).strip(" .")
    text = re.sub(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])", "", " ".join(text.split()))
    return text.casefold() if is_words(text) else text


def is_words(text: str) -> bool:
    """Words, not mathematics: compared as text only."""
    text = _unwrapped(text).strip(" .$")
    return (
        re.fullmatch(r"[A-Za-z'’,\s-]+", text) is not None
        and re.search(rf"(?<!\w)(?:(?!infinity\b)[A-Za-z]{{4,}}|(?:{_SHORT_WORDS})\b)", text, re.IGNORECASE) is not None
    )


def as_latex(text: str) -> str | None:
    """How math-verify reads it; None with unbalanced braces, of which it would read a part."""
    depth = 0
    for brace in _BRACE.finditer(text):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth < 0:
            return None
    text = (
        _ASCII_PI.sub(r"\\pi ", text.translate(_UNICODE))
        .replace("**", "^")
        .replace("<=", "\\le ")
        .replace(">=", "\\ge ")
        .replace("\\varnothing", "\\emptyset ")
    )
    return None if depth else text
