"""What is a secret: by the words of the key that it stands under, and in a text by its form.

One rule about keys serves mappings and prose alike: a key is divided into its words (`dbPass`, `db_pass`, `DB-PASS`),
so that `pin` is one and `shipping` is none, and `tokens_used` is a count.

A text is looked at from left to right, and nothing that was looked at is looked at again: the time grows with the
length of the text and never faster, since a caller decides what some texts hold. So there are only possessive
repetitions here, searches within windows, and scans that go on where the last one ended.
"""

from __future__ import annotations

import re
from binascii import Error as NotBase64
from binascii import a2b_base64
from collections.abc import Collection
from itertools import pairwise

REDACTED = "[redacted]"

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_KEY_LENGTH = 256


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Words that are secrets, wherever they stand in a key …
_ALONE = _set(
    """
    pass passcode passcodes pwd pwds pin cvv cvc otp otps totp jwt jwts csrf xsrf sessionid sessid phpsessid jsessionid
    cardnumber
    """
)
# … also as a part of a word, as in `dbpassword` …
_WITHIN = re.compile(
    r"passw(?:or)?d|passphrase|pwd|secret(?!ar|e(?!t)|i[ov]|ly)|token(?!i[sz])|credential|authorization|cookie"
    r"|(?:db|user|my|admin|root|ssh|smtp|ftp|mysql|pg|redis|http|proxy|key|store|account|login)pass$"
    r"|(?:api|access|private|signing|secret|encryption|session)keys?$"
)
# … and two words side by side.
_OF_KEYS = _set(
    """
    api access private signing secret encryption decryption master session shared ssh hmac cipher symmetric auth aes rsa
    gpg pgp storage account crypto wrapping root deploy webhook client
    """
)
_OF_CODES = _set("verification auth security recovery backup mfa sms time reset login activation")
_PAIRS = frozenset(
    [(word, key) for word in _OF_KEYS for key in ("key", "keys")]
    + [(word, code) for word in _OF_CODES for code in ("code", "codes")]
    + [("session", "id"), ("session", "ids"), ("card", "number"), ("card", "no"), ("card", "num"), ("cc", "number")]
    + [("cc", "num"), ("amz", "signature"), ("goog", "signature"), ("connect", "sid")]
)
_LAST = frozenset({"auth", "sig"})
# A key that ends so tells about a secret, and is none.
_ABOUT = _set(
    """
    used usage count counts limit limits total remaining left length len size type types kind policy policies expired
    expires expiry expiration at ttl age error errors exception warning required valid invalid enabled second seconds
    minute hour day ms
    """
)
_COUNTED = _set("max min total num prompt completion input output cached reasoning used remaining")
# Each of the above has one of these in it: whether a text has any is known much sooner than where.
_STEMS = (
    *("pass", "pwd", "pin", "cvv", "cvc", "otp", "jwt", "csrf", "xsrf", "sess", "secret", "token", "credential"),
    *("auth", "cookie", "key", "code", "card", "cc", "sig", "sid"),
)

_REMEMBERED = 4096
_SHORTEST = 11  # of what has a form and neither of `:`, `=` and `,` in it: `Bearer abcd`


class Secrets:
    """The rules, with a service's own keys.

    Args:
        more: keys that are secret too, alone and as a part of longer ones: `iban` also hides `customerIban`.
        plain: keys that are not secret, as a whole.
    """

    def __init__(self, more: Collection[str] = (), plain: Collection[str] = ()) -> None:
        self._more = [words for key in more if (words := _words(key))]
        self._plain = frozenset(" ".join(_words(key)) for key in plain)
        self._stems = (*_STEMS, *(words[0] for words in self._more))
        self.verdicts: dict[object, bool] = {}

    def is_key(self, key: object) -> bool:
        """Whether what stands under `key` is a secret; remembered, because a service uses few keys and many lines."""
        verdict = self.verdicts.get(key)
        if verdict is not None:
            return verdict
        if isinstance(key, bytes):
            return self.is_key(key[-_KEY_LENGTH:].decode("latin-1"))
        if not isinstance(key, str):
            return False
        text = str.__str__(key)[-_KEY_LENGTH:]
        verdict = self._has_stem(text) and self._is_secret(_words(text))
        if type(key) is str and len(key) < _KEY_LENGTH and len(self.verdicts) < _REMEMBERED:
            self.verdicts[key] = verdict
        return verdict

    def _is_secret(self, words: list[str]) -> bool:
        if not words or " ".join(words) in self._plain:
            return False
        for more in self._more:
            if any(words[at : at + len(more)] == more for at in range(len(words))):
                return True
        last = words[-1]
        if last in _ABOUT or (last == "tokens" and len(words) > 1 and words[-2] in _COUNTED):
            return False
        return (
            last in _LAST
            or words == ["sid"]
            or not _ALONE.isdisjoint(words)
            or not _PAIRS.isdisjoint(pairwise(words))
            or any(_WITHIN.search(word) for word in words)
        )

    def hide(self, text: str) -> str:
        """`text` without the secrets in it. Cheap where there are none."""
        if len(text) < _SHORTEST and ":" not in text and "=" not in text and "," not in text:
            return text
        if "-----" in text:
            text = _without_pem(text)
        if "://" in text and "@" in text:
            text = _RUN.sub(_without_userinfo, text)
        if "=" in text or ":" in text or "," in text:
            if self._has_stem(text):
                text = self._without_assigned(text)
            if "input_value=" in text:
                text = _without_input(text)
        if "eyJ" in text:
            text = _DOTTED.sub(_without_jwt, text)
        if "earer" in text or "EARER" in text or "asic " in text or "ASIC " in text:
            text = _SCHEME.sub(_without_scheme, text)
        if len(text) >= _SHORTEST_CARD and _MAYBE_CARD.search(text):
            text = _DIGITS.sub(_without_cards, text)
        return text

    def _has_stem(self, text: str) -> bool:
        lower = text.lower()
        for stem in self._stems:  # noqa: SIM110  a generator costs as much as the search
            if stem in lower:
                return True
        return False

    def _without_assigned(self, text: str) -> str:
        done: list[str] = []
        at = copied = 0
        while (found := _ASSIGNED.search(text, at)) is not None:
            at = found.end()
            if not self._is_assigned(found, text):
                continue
            begin, end = _value(text, at, found["key"].lower())
            if end > begin:
                done.append(text[copied:begin])
                done.append(REDACTED)
                copied = end
            at = max(at, end)
        return "".join(done) + text[copied:] if done else text

    def _is_assigned(self, found: re.Match[str], text: str) -> bool:
        key = found["key"]
        if found["pair"] is not None and found["close"] is None:
            return False
        if self.is_key(key):
            return True
        begin = found.start()
        if begin and text[begin - 1] == "\\" and self.is_key(key[1:]):
            return True  # of an escaped newline, the n
        if begin and text[begin - 1] == " " and key.lower() in _SECOND:
            before = text[max(0, begin - 16) : begin].split()
            return bool(before) and self.is_key(f"{before[-1]} {key}")
        return False


def _words(key: str) -> list[str]:
    return [word.lower() for word in _WORDS.findall(key)]


# Assignments

# token=…   password: …   "token":"…"   ['token'] = …   ('authorization', '…')   also JSON inside of JSON
_ASSIGNED = re.compile(
    r"""
    (?<![\w.-]) (?P<key> [\w.-]++ )
    (?: (?P<close> \\{0,7}["'] ) \]? )?+
    (?: [ \t]{0,3}+ (?: => | := | =(?!=) | :(?![:=]|//) ) [ \t]{0,64}+ (?: \n[ \t]{0,64}+ )?+
      | (?P<pair> ,\s? (?=b?\\{0,7}["']) )
    )
    """,
    re.VERBOSE,
)
_SECOND = frozenset({"key", "keys", "code", "codes", "number", "id"})  # of a pair with a space between: `api key: …`
_OPENING = re.compile(r"""[bBfFrRuU]{0,2}(?P<slashes>\\{0,7})(?P<quote>\"""|'''|["'`])""")
_QUOTES = {quote: re.compile(rf"(\\*+){quote}") for quote in "\"'`"}
_BRACKET = re.compile(r"[\[\](){}]")
_KEPT = re.compile(r"\[redacted|Secret(?:Str|Bytes)\(")
_SENT = re.compile(r"(?:bearer|basic|digest|negotiate|token|apikey)\s{1,8}+", re.IGNORECASE)
_REST = re.compile(r"[^\s&,;\"'})\]]*+")
_REST_OF_TWO = re.compile(r"[^\s&,;\"'})\]]++(?:[ ][^\s&,;\"'})\]]++)?")
_REST_OF_COOKIE = re.compile(r"[^\n\"']*+")
_QUOTED_WINDOW = 4096
_BRACKETS = 64
_BRACKETED_WINDOW = 1024


def _value(text: str, at: int, key: str) -> tuple[int, int]:
    """From where to where the value goes that begins at `at`; nowhere if there is none."""
    if _KEPT.match(text, at):
        return at, at
    opening = _OPENING.match(text, at)
    if opening is not None:
        begin = opening.end()
        return (begin, begin) if _KEPT.match(text, begin) else (begin, _end_of_quoted(text, opening))
    if text[at : at + 1] in ("[", "{", "("):
        end = _end_of_bracketed(text, at)
        return (at, at) if text[at + 1 : end - 1].strip() in ("", "redacted") else (at, end)
    sent = _SENT.match(text, at)
    begin = at if sent is None else sent.end()
    if _KEPT.match(text, begin):
        return begin, begin
    rest = _REST_OF_COOKIE if "cookie" in key else _REST_OF_TWO if "authorization" in key else _REST
    found = rest.match(text, begin)
    return begin, begin if found is None else found.end()


def _end_of_quoted(text: str, opening: re.Match[str]) -> int:
    begin, quote, slashes = opening.end(), opening["quote"], len(opening["slashes"])
    if len(quote) > 1:
        end = text.find(quote, begin, begin + _QUOTED_WINDOW)
        if end >= 0:
            return end
    else:
        for found in _QUOTES[quote].finditer(text, begin, begin + _QUOTED_WINDOW):
            more = len(found[1]) - slashes
            # A quote behind more backslashes than the opening one belongs to the value, unless they are themselves
            # escaped: at the outermost level an even number of them is.
            if more >= 0 and more % (2 * (slashes + 1)) == 0:
                return found.end() - 1 - slashes
    end = text.find("\n", begin)
    return len(text) if end < 0 else end


def _end_of_bracketed(text: str, begin: int) -> int:
    """Behind the bracket that closes the one at `begin`; where none does, everything that was looked at."""
    depth = 0
    for count, found in enumerate(_BRACKET.finditer(text, begin, begin + _BRACKETED_WINDOW), 1):
        depth += 1 if found[0] in "[({" else -1
        if depth == 0 or count == _BRACKETS:
            return found.end()
    return min(len(text), begin + _BRACKETED_WINDOW)


def _without_input(text: str) -> str:
    """Without what pydantic's ValidationError repeats of its input; it does so in at most some fifty characters."""
    done: list[str] = []
    at = 0
    while (found := text.find("input_value=", at)) >= 0:
        begin = found + len("input_value=")
        end = text.find(", input_type=", begin, begin + 600)
        if end < 0:
            line = text.find("\n", begin, begin + 600)
            end = min(len(text), begin + 600) if line < 0 else line
        done.append(text[at:begin])
        done.append(REDACTED)
        at = end
    return "".join(done) + text[at:]


# Addresses

_RUN = re.compile(r"(?<![A-Za-z0-9+.-])[A-Za-z0-9+.-]{0,32}+://[^\s\"'<>]{1,2048}+|://[^\s\"'<>]{1,2048}+")
_END_OF_AUTHORITY = re.compile(r"[/?#]")
_PORT = re.compile(r"[^:]*+:\d{1,5}+(?![^,;)\]}])")
_OF_THE_WEB = ("http", "https", "ws", "wss")


def _without_userinfo(run: re.Match[str]) -> str:
    """Without what stands before the @ of an address; in one address of the web a name alone is a token too."""
    text = run[0]
    done: list[str] = []
    copied = 0
    at = text.find("@")
    begin = text.find("://")
    while begin >= 0 and at >= 0:
        scheme = text[copied:begin].rpartition(",")[2].lower()
        begin += 3
        if at < begin:
            at = text.find("@", begin)
            if at < 0:
                break
        end_of_authority = _END_OF_AUTHORITY.search(text, begin)
        end = len(text) if end_of_authority is None else end_of_authority.start()
        if at < end:
            at = text.rfind("@", begin, end)
            colon = text.find(":", begin, at)
            hidden = colon + 1 if colon >= 0 else begin if scheme in _OF_THE_WEB else at
        else:
            # What should have been encoded: a password with a / or a ? in it. A port is no password.
            colon = text.find(":", begin, end)
            port = scheme in _OF_THE_WEB and _PORT.match(text, begin, end) is not None
            asked = text.find("?", begin, at) >= 0 and _PORT.match(text, begin, end) is not None
            hidden = at if colon < 0 or port or asked else colon + 1
        if hidden < at:
            if text[hidden:at] != REDACTED:
                done.append(text[copied:hidden])
                done.append(REDACTED)
                copied = at
            end = at
        begin = text.find("://", end)
    return "".join(done) + text[copied:]


# Keys in PEM's form

_PEM = re.compile(r"-----BEGIN ([A-Z0-9 ]{1,64}+)-----")
_END_OF_PEM = re.compile(r"-----END ([A-Z0-9 ]{1,64}+)-----")
_PUBLIC = ("CERTIFICATE", "PUBLIC KEY", "CERTIFICATE REQUEST", "CRL", "PUBLIC KEY BLOCK")
# Of a block whose end is not there: its headers, and what could be its lines, however they were joined.
_BODY = re.compile(
    r"(?:\s|\\+[nr])*+(?:[A-Z][A-Za-z-]{2,24}+: [^\n\\]{1,200}+(?:\r?\n|\\+[nr])++)*+"
    r"(?:[\s\"',A-Za-z0-9+/=]|\\+[nrt\"'])*+"
)
_OF_BODY = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\n\r\\")


def _without_pem(text: str) -> str:
    done: list[str] = []
    copied = 0
    first = _PEM.search(text)
    end = _END_OF_PEM.search(text)
    if end is not None and (first is None or end.start() < first.start()) and not end[1].endswith(_PUBLIC):
        # Its beginning was cut off.
        begin = end.start()
        while begin > 0 and text[begin - 1] in _OF_BODY:
            begin -= 1
        done.append(text[:begin])
        done.append(REDACTED)
        copied = end.end()
    at = copied
    while (block := _PEM.search(text, at)) is not None:
        at = block.end()
        if block[1].endswith(_PUBLIC):
            continue
        if end is not None and end.start() < at:
            end = _END_OF_PEM.search(text, at)
        following = _PEM.search(text, at)
        if end is not None and (following is None or end.start() < following.start()):
            at = end.end()
        else:
            body = _BODY.match(text, at, len(text) if following is None else following.start())
            at = at if body is None else body.end()
        done.append(text[copied : block.start()])
        done.append(REDACTED)
        copied = at
    return "".join(done) + text[copied:]


# Tokens

_DOTTED = re.compile(r"(?<![A-Za-z0-9_.-])[A-Za-z0-9_.-]{16,}+")
_SHORTEST_HEADER = 9
_SCHEME = re.compile(
    r"\b(?P<name>bearer|basic)(?P<space>(?:[ \t]|%20){1,8}+)(?P<token>[A-Za-z0-9._~+/%-]{4,}+=*+)(?!\")", re.IGNORECASE
)
_PROSE = _set(
    """
    token tokens auth authentication authorization scheme schemes realm header headers missing format required error
    errors credential credentials prefix value type was with from must should expected instead
    """
)
_LONG_LOWER = 16


def _without_jwt(found: re.Match[str]) -> str:
    text = found[0]
    at = 0
    for part in text.split(".")[:-1]:
        begin = part.find("eyJ")
        if 0 <= begin <= len(part) - _SHORTEST_HEADER:
            return text[: at + begin] + REDACTED
        at += len(part) + 1
    return text


def _without_scheme(found: re.Match[str]) -> str:
    name, token = found["name"], found["token"]
    if name.lower() == "basic":
        try:
            secret = b":" in a2b_base64(token + "=" * (-len(token) % 4))
        except (NotBase64, ValueError):
            secret = False
    elif name.islower() and token.isalpha():
        secret = len(token) >= _LONG_LOWER
    else:
        secret = token.rstrip(".").lower() not in _PROSE
    return f"{name}{found['space']}{REDACTED}" if secret else found[0]


# Cards

_SHORTEST_CARD = 13
_LONGEST_CARD = 19
_MAYBE_CARD = re.compile(r"\d{4}[ -]?\d{2}")
_DIGITS = re.compile(r"(?<![0-9A-Za-z])\d(?:[ -]?\d){12,}+(?![0-9A-Za-z])")
_GROUP = re.compile(r"\d++")
# The numbers that schemes begin with; without it one of ten times in milliseconds would be a card.
_ISSUED = re.compile(
    r"4|5[0-5]|5[6-8]|2(?:22[1-9]|2[3-9]|[3-6]|7[01]|720)|3[47]|6(?:011|4[4-9]|5|2|304|7)|35(?:2[89]|[3-8])|3(?:0[0-5]|[689])"
)


def _without_cards(run: re.Match[str]) -> str:
    text = run[0]
    groups = list(_GROUP.finditer(text))
    done: list[str] = []
    copied = at = 0
    while at < len(groups):
        end = _end_of_card(groups, at)
        if end is None:
            at += 1
            continue
        done.append(text[copied : groups[at].start()])
        done.append(REDACTED)
        copied = groups[end].end()
        at = end + 1
    return "".join(done) + text[copied:]


def _end_of_card(groups: list[re.Match[str]], begin: int) -> int | None:
    digits = ""
    for at in range(begin, len(groups)):
        digits += groups[at][0]
        if len(digits) > _LONGEST_CARD:
            return None
        if len(digits) >= _SHORTEST_CARD and is_card(digits):
            return at
    return None


def is_card(digits: str) -> bool:
    """Whether `digits`, and nothing else, are the number of a payment card: its issuer's and its check digit's."""
    if not _SHORTEST_CARD <= len(digits) <= _LONGEST_CARD or _ISSUED.match(digits) is None:
        return False
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (doubled + sum(int(digit) for digit in digits[-1::-2])) % 10 == 0
