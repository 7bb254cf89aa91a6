"""No secret in a line, by key and by form, in a time that grows no faster than the text; and no line without end."""

import io
import json
import logging
import subprocess
import sys
from collections import UserDict, deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from mainstay.core import ConfigurationError
from mainstay.observability import LogLimits, ObservabilitySettings
from mainstay.observability._logging import configured
from mainstay.observability._redaction import redact_text
from mainstay.observability._secrets import Secrets
from mainstay.observability.testing import metric
from packages.observability.tests import costs
from packages.observability.tests.costs import cost


@contextmanager
def lines(**settings):
    """The settings' pipeline, and a function that gives what was written so far, parsed."""
    stream = io.StringIO()
    with configured(ObservabilitySettings(service_name="orders", **settings), stream):
        yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("postgresql+asyncpg://app:hunter2@db:5432/x", "postgresql+asyncpg://app:[redacted]@db:5432/x"),
        ("GET https://api/x?token=hunter2&page=2", "GET https://api/x?token=[redacted]&page=2"),
        ("Authorization: Bearer hunter2", "Authorization: Bearer [redacted]"),
        ("password='hunter2'", "password='[redacted]'"),
        ("sent {'token': 'hunter2', 'n': 1}", "sent {'token': '[redacted]', 'n': 1}"),
        ('sent {"token": "hunter2", "n": 1}', 'sent {"token": "[redacted]", "n": 1}'),
        ("password: hunter2", "password: [redacted]"),
        ("password = 'a, hunter2' in force", "password = '[redacted]' in force"),
        ("{'password': \"it's, hunter2\", 'n': 1}", "{'password': \"[redacted]\", 'n': 1}"),
        ('body {"user":"a","password":"hunter2","n":1}', 'body {"user":"a","password":"[redacted]","n":1}'),
        (r'{"b": "{\"pwd\": \"x\\\"hunter2\", \"n\": 1}"}', r'{"b": "{\"pwd\": \"[redacted]\", \"n\": 1}"}'),
        ('{"tokens": ["hunter2", "hunter2"]}', '{"tokens": [redacted]}'),
        ("client_secret=hunter2;access_key_id=hunter2", "client_secret=[redacted];access_key_id=[redacted]"),
        ('{"x-api-key": "hunter2"}', '{"x-api-key": "[redacted]"}'),
        ("Authorization: Token hunter2", "Authorization: Token [redacted]"),
        ("Authorization: Unheard-of hunter2", "Authorization: [redacted]"),
        ("{b'authorization': b'Bearer hunter2'}", "{b'authorization': b'[redacted]'}"),
        ("[('authorization', 'Bearer hunter2'), ('a', 'b')]", "[('authorization', '[redacted]'), ('a', 'b')]"),
        ("Set-Cookie: a=hunter2; b=hunter2", "Set-Cookie: [redacted]"),
        ("redis://:p@hunter2@db/0", "redis://:[redacted]@db/0"),
        ("amqp://app:p/hunter2@mq:5672/x", "amqp://app:[redacted]@mq:5672/x"),
        ("cloning https://hunter2@github.com/x?e=a@b", "cloning https://[redacted]@github.com/x?e=a@b"),
        ("[type=x, input_value='hunter2, a', input_type=str]", "[type=x, input_value=[redacted], input_type=str]"),
        (
            "nothing here: a=b http://host:80/p?e=a@b ssh://git@host",
            "nothing here: a=b http://host:80/p?e=a@b ssh://git@host",
        ),
        (
            "InvalidTokenError: it has expired, KeyError: 'token'",
            "InvalidTokenError: it has expired, KeyError: 'token'",
        ),
        ("password=SecretStr('***') token='' tokens: []", "password=SecretStr('***') token='' tokens: []"),
    ],
)
def test_secrets_in_prose_are_redacted(said, kept):
    """Addresses and assignments inside a message lose their secret and nothing else."""
    assert redact_text(said) == kept
    assert redact_text(kept) == kept
    with lines() as written:
        logging.getLogger("asyncpg").error("cannot connect to %s", said)
        assert "hunter2" not in json.dumps(written())


SECRET = """
    pass db_pass dbPass DB-PASS dbpass passcode password passwords PASSWORD mysql_password pwd passphrase pin PIN
    user_pin userPIN cvv cvv2 cvc card_cvc otp totp_code otp_code session_id sessionId session-id sessionid PHPSESSID
    encryption_key encryptionKey ENCRYPTION_KEY api_key apiKey APIKey x-api-key private_key signing_key master_key
    access_token refresh_tokens authtoken token tokens clientSecret client_secret secret credentials authorization
    Proxy-Authorization auth basic_auth x-auth cookie Set-Cookie jwt csrf sid connect.sid sig X-Amz-Signature
    card_number recovery_codes
"""
PLAIN = """
    tokens_used token_count max_tokens prompt_tokens total_tokens token_type tokens_per_second password_length
    password_policy shipping spinner pinned opinion compass bypass passenger passed secretary secretariat tokenizer
    author authority public_key primary_key idempotency_key partition_key cache_key session sessions discount account
    code postcode sidecar signal design keyboard monkey pass_count cardinality status_code cookie_count expires_at
"""


@pytest.mark.parametrize("key", SECRET.split())
def test_a_key_that_names_a_secret_hides_it(key):
    """As a field, inside of a value, as bytes, and in a text behind the key."""
    assert Secrets().is_key(key)
    with lines() as written:
        structlog.get_logger().info("x", **{key: "hunter2"}, inner=[{key: ["hunter2"]}, {key.encode(): "hunter2"}])
        for form in ("%s=hunter2", "%s: 'hunter2'", '{"%s": "hunter2"}'):
            logging.getLogger("lib").warning(form, key)
        text = json.dumps(written())
    assert "hunter2" not in text
    assert text.count("[redacted]") == 6


@pytest.mark.parametrize("key", PLAIN.split())
def test_a_key_that_only_resembles_one_hides_nothing(key):
    """Parts of words, and what tells about a secret, such as how many there are."""
    assert not Secrets().is_key(key)
    assert redact_text(f"{key}=17 {{'{key}': 18}}") == f"{key}=17 {{'{key}': 18}}"


def test_a_service_names_keys_of_its_own():
    """More secret keys, alone and in longer ones, and whole ones that are none; and all is as before afterwards."""
    own = {"secret_keys": {"iban", "date of birth"}, "plain_keys": {"session_id"}}
    with lines(**own) as written:
        structlog.get_logger().info("x", customerIban="D", dateOfBirth="2", sessionId="3", db_session_id="4", urban="5")
        logging.getLogger("lib").warning("iban=DE1 session_id=3")
        first, second = written()
    assert (first["customerIban"], first["dateOfBirth"], first["db_session_id"]) == ("[redacted]",) * 3
    assert (first["sessionId"], first["urban"]) == ("3", "5")
    assert second["event"] == "iban=[redacted] session_id=3"
    assert redact_text("iban=DE1 session_id=3") == "iban=DE1 session_id=[redacted]"


KEY = "RSA PRIVATE KEY"
BEGIN, END = f"-----BEGIN {KEY}-----", f"-----END {KEY}-----"
BODY = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQhunter2"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.hunter2-hunter2_x"


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (f"key {BEGIN}\n{BODY}\n{BODY}\n{END} loaded", "key [redacted] loaded"),
        (f"key {BEGIN}\\n{BODY}\\n{BODY}\\n{END} loaded", "key [redacted] loaded"),
        (f'{{"pem": "{BEGIN}\\\\n{BODY}\\\\n{END}", "n": 1}}', '{"pem": "[redacted]", "n": 1}'),
        (f"['{BEGIN}', '{BODY}', '{END}']", "['[redacted]']"),
        (f"truncated {BEGIN}\n{BODY}\n{BODY[:9]}", "truncated [redacted]"),
        (f"truncated {BEGIN}\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,0F\n\n{BODY}", "truncated [redacted]"),
        (f"{BODY}\n{BODY}\n{END} behind a cut", "[redacted] behind a cut"),
        (f"{BEGIN}\n{BODY}\n{END}\n{BEGIN}\n{BODY}\n{END}", "[redacted]\n[redacted]"),
        (f"private_key={BEGIN}\n{BODY}\n{END}", "private_key=[redacted]"),
        ("got Bearer hunter2hunter2 from it", "got Bearer [redacted] from it"),
        ("got Bearer hunterhunter from it", "got Bearer [redacted] from it"),
        ("a bearer hunter2/hunter2+hunter2== sent", "a bearer [redacted] sent"),
        ("Basic YW5uOmh1bnRlcjI= sent", "Basic [redacted] sent"),
        (f"token {JWT}, expired", "token [redacted], expired"),
        (f"[{JWT}] and\\n{JWT}", "[[redacted]] and\\n[redacted]"),
        ("card 4111 1111 1111 1111 of 2", "card [redacted] of 2"),
        ("17 4111-1111-1111-1111 2 5500005555555559", "17 [redacted] 2 [redacted]"),
        ("378282246310005 declined", "[redacted] declined"),
        ('password="""hunter2\nhunter2""" done', 'password="""[redacted]""" done'),
        ("password='''hunter2''' done", "password='''[redacted]''' done"),
        ('{"password": "a\nhunter2", "n": 1}', '{"password": "[redacted]", "n": 1}'),
        ("{'password': ['a', ['deep', 'hunter2']], 'n': 1}", "{'password': [redacted], 'n': 1}"),
        ("os.environ['DB_PASS'] = 'hunter2'", "os.environ['DB_PASS'] = '[redacted]'"),
        (
            "https://ann:hunter2@host/x and https://hunter2@host",
            "https://ann:[redacted]@host/x and https://[redacted]@host",
        ),
        ("amqp://u:1234/5@h", "amqp://u:[redacted]@h"),
        ("redis://u:a?hunter2@h/0", "redis://u:[redacted]@h/0"),
        ("redis://u:a://hunter2@h/0", "redis://u:[redacted]@h/0"),
        ("api key: hunter2, security code = 123456", "api key: [redacted], security code = [redacted]"),
        ("https://store/x?X-Amz-Signature=hunter2&n=1", "https://store/x?X-Amz-Signature=[redacted]&n=1"),
    ],
)
def test_secrets_are_known_by_their_form(said, kept):
    """Keys in PEM's form, tokens, cards, passwords in addresses and quotes; and nothing twice."""
    assert redact_text(said) == kept
    assert redact_text(kept) == kept
    with lines() as written:
        structlog.get_logger().info(said, value=said, inner=[said])
        (line,) = written()
    assert (line["event"], line["value"], line["inner"]) == (kept, kept, [kept])


@pytest.mark.parametrize(
    "said",
    [
        "Bearer token is missing, bearer of bad news, bearer instruments",
        'WWW-Authenticate: Bearer realm="api"',
        "Basic understanding, basic authentication",
        "at 1764351221000 ms, 20261128173341 and 1764351221000123 us, order 4111111111111112",
        "id 550e8400-e29b-41d4-a716-446655440000 in 4bf92f3577b34da6a3ce929d0e0e4736",
        "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
        "see http://host:80/p?e=a@b, http://a:80/x,http://b:81/@y and ssh://git@host",
        "if token == expected: raise",
        "eyJust a word. eyJ.",
    ],
)
def test_what_only_resembles_a_secret_is_kept(said):
    """Prose, times, ids and certificates."""
    assert redact_text(said) == said


def test_a_number_of_a_card_is_no_number_of_a_line():
    """An integer is looked at too, and one of many digits is not spelt out."""
    with lines() as written:
        structlog.get_logger().info("x", card=4111111111111111, order=4111111111111112, huge=10**5000, inner=[10**5000])
        (line,) = written()
    assert (line["card"], line["order"]) == ("[redacted]", 4111111111111112)
    assert line["huge"] == line["inner"][0] == "[a number of 16610 bits]"


SHAPES = [
    "://:x", "https://", "://:x@", "a:b://c:d@e ", "redis://a,", "token=", "token=[", "token=[\n", "token=(", "token='",
    "token='\n", 'token="' + "\\" * 9 + '"\n', "token" + "\\" * 50, "tokens", "token_", "token   ", "password: ",
    "api key ", "input_value=", "input_value='x', input_type=", "cookie: a ", "authorization: bearer x y ", BEGIN, END,
    BEGIN + "\n" + END, "-----", "-----BEGIN A", "Bearer ", "Bearer x", "bearer\t", "Basic YW5u ", "eyJ", "eyJa.",
    "eyJaaaaaaaa-", ".eyJaaaaaaa", "4111", "4 1 1 1 ", "4111 1111 1111 1111 ", "1-", "\\", "\\n", '\\"', "a=", "a:",
    "'"*3, '"'*3, "['", "{[(", "\n", " ", "\u2028", "x",
]  # fmt: skip


@given(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_the_time_grows_with_the_text_and_no_faster(shapes, times):
    """Eight times the text takes about eight times the time, and not sixty-four, for texts of every shape."""
    unit = "".join(shape * times for shape in shapes)
    small, large = cost(unit, 16_000), cost(unit, 128_000)
    assert large < 8 * small * 4 + 0.005, unit


def test_a_megabyte_costs_a_small_multiple_of_a_plain_one():
    """A text of one shape alone, beside prose of its length; in a process of its own, where no coverage is measured."""
    plain = "2026-11-28 GET https://host/path?page=2 answered status=200 in 17 ms: all is well\n"
    command = [sys.executable, costs.__file__]
    done = subprocess.run(command, input=json.dumps([plain, SHAPES]), capture_output=True, text=True, check=True)
    ratios = json.loads(done.stdout)
    assert ratios.keys() == {*SHAPES, "a megabyte"}
    assert max(ratios.values()) < 25, ratios


class Form(BaseModel):
    user: str
    password: str = Field(min_length=5)
    kept_out: str = Field("hunter2", repr=False)


@dataclass
class Credentials:
    user: str
    private_key: str
    kept_out: str = field(default="hunter2", repr=False)


class Pair(NamedTuple):
    user: str
    token: str


class Kind(Enum):
    LOGIN = "login"


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (Form(user="ann", password="hunter2"), {"user": "ann", "password": "[redacted]"}),
        ([{"form": Form(user="ann", password="hunter2")}], [{"form": {"user": "ann", "password": "[redacted]"}}]),
        (Credentials("ann", "hunter2"), {"user": "ann", "private_key": "[redacted]"}),
        (Pair("ann", "hunter2"), {"user": "ann", "token": "[redacted]"}),
        (deque([UserDict({"pwd": "hunter2"})]), [{"pwd": "[redacted]"}]),
        (
            {b"password": b"hunter2", 1: {"access_key": "hunter2"}},
            {"password": "[redacted]", "1": {"access_key": "[redacted]"}},
        ),
        ({"x-api-key": "hunter2", "private-key": "hunter2"}, {"x-api-key": "[redacted]", "private-key": "[redacted]"}),
        ([(b"authorization", b"Bearer hunter2"), (b"a", b"b")], [["authorization", "[redacted]"], ["a", "b"]]),
        (("cookie", "hunter2"), ["cookie", "[redacted]"]),
        ({("token", 1), "token=hunter2"} - {("token", 1)}, ["token=[redacted]"]),
        ({"redis://:hunter2@host": 1}, {"redis://:[redacted]@host": 1}),
        (b'{"password":"hunter2"}', '{"password":"[redacted]"}'),
        (ValueError("token=hunter2"), "ValueError('token=[redacted]')"),
        ({"password": "hunter2"}.items(), "dict_items([('password', '[redacted]')])"),
        ([Kind.LOGIN, Path("/a"), 1.5, None], ["login", "/a", 1.5, None]),
    ],
)
def test_secrets_inside_of_values_are_redacted(value, kept):
    """What names its parts is looked into: models, dataclasses, named tuples, headers, keys that are bytes."""
    with lines() as written:
        structlog.get_logger().info("in", value=value)
        logging.getLogger("lib").warning("in", extra={"value": value})
        structlog.get_logger().info(value)
        assert [line.get("value", line["event"]) for line in written()] == [kept] * 3


# Limits


def test_a_long_value_is_cut_with_a_mark():
    """Texts, bytes, lists, mappings and depth; what was cut is said."""
    with lines(log_limits=LogLimits(value_chars=100, members=3, depth=2)) as written:
        log = structlog.get_logger()
        log.info("e" * 150, text="a" * 1_000_000, raw=b"b" * 1_000_000, many=list(range(10)))
        log.info("x", mapping={n: n for n in range(10)}, deep=[[[1]]])
        log.info("x", **{f"f{n}": n for n in range(10)})
        first, second, third = written()
    assert first["event"] == "e" * 100 + "[50 characters cut]"
    assert first["text"] == "a" * 100 + "[999900 characters cut]"
    assert first["raw"].startswith("b" * 100 + "[")
    assert "1000000 bytes" in first["raw"]
    assert first["many"] == [0, 1, 2, "[7 more]"]
    assert second["mapping"] == {"0": 0, "1": 1, "2": 2, "[more]": 7}
    assert second["deep"] == [["[too deep]"]]
    assert {name for name in third if name.startswith("f")} == {"f0", "f1", "f2"}
    assert third["[more]"] == 7


def test_a_secret_at_a_cut_is_hidden_before():
    """No half of a password is left, wherever the cut falls."""
    secrets = ("postgresql://u:hunter2hunter2@h/x", f"{BEGIN}\n{BODY}", "Bearer hunter2hunter2", "pin=hunter2")
    with lines(log_limits=LogLimits(value_chars=100)) as written:
        for before in range(60, 101):
            for secret in secrets:
                structlog.get_logger().info("x", value="-" * before + " " + secret + "z" * 5000)
        assert "hun" not in json.dumps(written())


@pytest.mark.parametrize("log_format", ["json", "ecs", "journal", "console"])
def test_no_line_is_longer_than_it_may_be(log_format):
    """Of anything that a caller logs; and the line says what was cut."""
    hostile: list[dict[str, Any]] = [
        {"a": "x" * 1_000_000},
        {f"f{n}": "\x00" * 5000 for n in range(90)},
        {"rows": [{"a": 1, "b": "c" * 50}] * 100_000},
        {"n" * 1_000_000: 1},
        {f"{n}{'k' * 300}": n for n in range(500)},
        {"deep": [[[[[["x"] * 100] * 100] * 100] * 100] * 100]},
        {"é" * 200: "é" * 1_000_000},
    ]
    before = metric("mainstay_log_lines_changed_total", reason="cut")
    stream = io.StringIO()
    with configured(ObservabilitySettings(service_name="s", log_format=log_format), stream):
        for fields in hostile:
            for way in range(2):
                stream.seek(0)
                stream.truncate()
                if way:
                    structlog.get_logger().error("the event", **fields)
                else:
                    logging.getLogger("lib").error("the event", extra=fields)
                assert 0 < len(stream.getvalue()) <= 33_000
                assert "the event" in stream.getvalue()
    assert metric("mainstay_log_lines_changed_total", reason="cut") > before


def test_a_long_traceback_keeps_its_ends():
    """Where it began and what it says remain; the middle is cut."""

    def deeper(n):
        if n == 0:
            msg = "the end" + "!" * 50
            raise ValueError(msg)
        other(n - 1)

    def other(n):
        deeper(n)

    with lines(log_limits=LogLimits(value_chars=2000)) as written:
        try:
            deeper(200)
        except ValueError:
            logging.getLogger("lib").exception("x")
        (line,) = written()
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("the end" + "!" * 50)
    assert "characters cut]" in line["exception"]
    assert len(line["exception"]) < 2100


@pytest.mark.parametrize("wrong", [{"value_chars": 0}, {"line_chars": 10}, {"depth": 0}, {"members": 0}, {"other": 1}])
def test_limits_are_checked(wrong, monkeypatch):
    """A limit that leaves nothing is a configuration error."""
    monkeypatch.setenv("MAINSTAY_OBSERVABILITY_LOG_LIMITS", json.dumps(wrong))
    with pytest.raises(ConfigurationError, match="MAINSTAY_OBSERVABILITY_LOG_LIMITS"):
        ObservabilitySettings(service_name="s")
