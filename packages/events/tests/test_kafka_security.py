"""Connections that ask who is there: what is wrong is named, and what is right works as without."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from mainstay.core import SYSTEM_CLOCK, App, ConfigurationError
from mainstay.core.testing import VirtualClock
from mainstay.events import EventsModule, EventsSettings, KafkaToken
from mainstay.events._kafka.tls import context_of
from mainstay.events._kafka.tokens import NoTokenError, Tokens
from mainstay_servers.secure import Authority

pytestmark = [
    pytest.mark.usefixtures("aiokafka_garbage"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # see the fixture
]


async def fetch_token() -> KafkaToken:
    """A function as services write one, for its place in the environment."""
    return KafkaToken(SecretStr("t0ken"), 60)


def on_kafka(**values: Any) -> EventsSettings:
    return EventsSettings(transport="kafka", kafka_servers="127.0.0.1:1", outbox=False, **values)


ACCOUNT = {"kafka_username": "ann", "kafka_password": "hunter2"}
BEARER = {"kafka_protocol": "SASL_SSL", "kafka_mechanism": "OAUTHBEARER"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kafka_certificate_file": "a"}, "'PLAINTEXT' cannot honour kafka_certificate_file"),
        ({"kafka_key_file": "a"}, "'PLAINTEXT' cannot honour kafka_key_file"),
        ({"kafka_key_password": "hunter2"}, "'PLAINTEXT' cannot honour kafka_key_password"),
        ({"kafka_token": fetch_token}, "'PLAINTEXT' cannot honour kafka_token"),
        ({"kafka_protocol": "SSL", "kafka_key_file": "a"}, "needs kafka_certificate_file"),
        ({"kafka_protocol": "SSL", "kafka_key_password": "hunter2"}, "needs kafka_certificate_file"),
        ({"kafka_protocol": "SASL_SSL"}, "needs kafka_username and kafka_password"),
        ({"kafka_protocol": "SASL_SSL", "kafka_username": "ann"}, "needs kafka_username and kafka_password"),
        ({"kafka_protocol": "SASL_SSL", **ACCOUNT, "kafka_password": ""}, "needs kafka_username and kafka_password"),
        ({"kafka_protocol": "SASL_SSL", **ACCOUNT, "kafka_token": fetch_token}, "'PLAIN' cannot honour kafka_token"),
        (BEARER, "'OAUTHBEARER' needs kafka_token"),
        ({**BEARER, **ACCOUNT, "kafka_token": fetch_token}, "'OAUTHBEARER' cannot honour kafka_password"),
        ({**BEARER, "kafka_token": "no.such.module:f"}, "MAINSTAY_EVENTS_KAFKA_TOKEN"),
        ({**BEARER, "kafka_token": 7}, "MAINSTAY_EVENTS_KAFKA_TOKEN"),
        ({"kafka_protocol": "TLS"}, "MAINSTAY_EVENTS_KAFKA_PROTOCOL"),
        ({"kafka_instance_id": "two words"}, "'two words' is no name of a member"),
        ({"kafka_instance_id": ""}, "'' is no name of a member"),
        ({"kafka_options": {"enable.auto.commit": 1}}, "'enable.auto.commit' cannot be passed.*fetch.min.bytes"),
        (
            {"kafka_options": {"fetch.min.bytes": "many"}},
            "'fetch.min.bytes' is 'many', and must be a whole number from",
        ),
        ({"kafka_options": {"linger.ms": -1}}, "'linger.ms' is -1, and must be a whole number from 0"),
        ({"kafka_options": {"compression.type": "rar"}}, "'compression.type' is 'rar', and must be one of gzip"),
    ],
)
def test_what_a_connection_cannot_use_or_lacks_is_named(values: dict[str, Any], message: str) -> None:
    """Where the settings are made, and without a secret."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        on_kafka(**values)
    assert "hunter2" not in str(caught.value)


def test_the_token_function_is_found_by_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """All settings can come from the environment, also the one that is code."""
    for name, value in {**BEARER, "transport": "kafka", "kafka_servers": "x:1"}.items():
        monkeypatch.setenv(f"MAINSTAY_EVENTS_{name}".upper(), value)
    monkeypatch.setenv("MAINSTAY_EVENTS_KAFKA_TOKEN", "os.path:abspath")
    assert EventsSettings().kafka_token is os.path.abspath  # type: ignore[comparison-overlap]
    monkeypatch.setenv("MAINSTAY_EVENTS_KAFKA_OPTIONS", '{"linger.ms": 20}')
    assert EventsSettings().kafka_options == {"linger.ms": 20}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Certificates and keys, good and bad."""
    directory = tmp_path_factory.mktemp("certificates")
    authority = Authority(directory, "authority")
    certificate, key = authority.sign("ann")
    other_certificate, other_key = authority.sign("bob")
    locked_certificate, locked_key = authority.sign("locked", password="hunter2")
    both = directory / "both.pem"
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    broken = directory / "broken.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
    text = directory / "text.pem"
    text.write_text("no certificate")
    found = {
        "authority": authority.file, "certificate": certificate, "key": key, "other certificate": other_certificate,
        "other key": other_key, "locked certificate": locked_certificate, "locked key": locked_key, "both": both,
        "broken": broken, "text": text, "directory": directory, "nowhere": Path("/nowhere/x.pem"),
    }  # fmt: skip
    return {name: str(path) for name, path in found.items()}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ca": "nowhere"}, r"KAFKA_CA_FILE=/nowhere/x\.pem cannot be read: No such file"),
        ({"ca": "directory"}, "KAFKA_CA_FILE=.* cannot be read: Is a directory"),
        ({"ca": "text"}, r"KAFKA_CA_FILE=.*text\.pem holds no certificate in PEM form"),
        ({"ca": "key"}, r"KAFKA_CA_FILE=.*\.key holds no certificate"),
        ({"ca": "broken"}, r"KAFKA_CA_FILE=.*broken\.pem holds a broken certificate"),
        ({"certificate": "nowhere"}, "KAFKA_CERTIFICATE_FILE=/nowhere/x.pem cannot be read"),
        ({"certificate": "key"}, "KAFKA_CERTIFICATE_FILE=.* holds no certificate"),
        ({"certificate": "broken", "key": "key"}, "KAFKA_CERTIFICATE_FILE=.*broken.* cannot be used"),
        ({"certificate": "certificate"}, "KAFKA_CERTIFICATE_FILE=.* holds no private key"),
        ({"certificate": "certificate", "key": "nowhere"}, "KAFKA_KEY_FILE=/nowhere/x.pem cannot be read"),
        ({"certificate": "certificate", "key": "certificate"}, "KAFKA_KEY_FILE=.* holds no private key"),
        ({"certificate": "certificate", "key": "other key"}, "KAFKA_KEY_FILE=.* does not belong to the certificate"),
        ({"certificate": "locked certificate", "key": "locked key"}, "set MAINSTAY_EVENTS_KAFKA_KEY_PASSWORD"),
        (
            {"certificate": "locked certificate", "key": "locked key", "password": "hunter3"},
            "KAFKA_KEY_PASSWORD is not the password of the private key in .*locked.key",
        ),
        (
            {"certificate": "certificate", "key": "key", "password": "hunter2"},
            "holds a private key without a password: leave out MAINSTAY_EVENTS_KAFKA_KEY_PASSWORD",
        ),
    ],
)
def test_a_wrong_file_is_named_when_the_app_is_constructed(
    files: dict[str, str], values: dict[str, str], message: str
) -> None:
    """With its setting and what is wrong with it: nothing is left for the first connection to find out."""
    names = {"ca": "kafka_ca_file", "certificate": "kafka_certificate_file", "key": "kafka_key_file"}
    settings = on_kafka(
        kafka_protocol="SSL",
        kafka_key_password=values.pop("password", None),
        **{names[what]: files[name] for what, name in values.items()},
    )
    with pytest.raises(ConfigurationError, match=message) as caught:
        App(EventsModule.for_root(settings))
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize(
    ("certificate", "key", "password"),
    [("certificate", "key", None), ("both", None, None), ("locked certificate", "locked key", "hunter2")],
)
def test_certificates_and_keys_are_taken_in_each_form(
    files: dict[str, str], certificate: str, key: str | None, password: str | None
) -> None:
    """A key of its own or in one file with the certificate, with a password or without."""
    settings = on_kafka(
        kafka_protocol="SSL",
        kafka_ca_file=files["authority"],
        kafka_certificate_file=files[certificate],
        kafka_key_file=None if key is None else files[key],
        kafka_key_password=password,
    )
    App(EventsModule.for_root(settings))
    context = context_of(settings)
    assert context.check_hostname
    assert len(context.get_ca_certs()) == 1  # and none of the system's


async def test_a_token_is_asked_for_once_and_again_before_it_expires() -> None:
    """All connections that are made at once share an answer; a token in its last fifth is replaced."""
    asked = 0

    async def fetch() -> KafkaToken:
        nonlocal asked
        asked += 1
        number = asked
        await asyncio.sleep(0)
        return KafkaToken(SecretStr(f"token {number}"), 100)

    clock = VirtualClock()
    tokens = Tokens(fetch, clock)
    assert await asyncio.gather(*(tokens.current() for _ in range(5))) == [("token 1", 100)] * 5
    await clock.advance(79)
    assert await tokens.current() == ("token 1", 21)
    await clock.advance(1)
    assert await tokens.current() == ("token 2", 100)
    tokens.refused()
    assert await tokens.current() == ("token 3", 100)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (ValueError("hunter2"), "fetch gave no token: ValueError"),
        ("hunter2", "fetch gave no KafkaToken, but a str"),
        (KafkaToken(SecretStr(""), 60), "fetch gave a token that is empty"),
        (KafkaToken(SecretStr("hunter2"), 0), "fetch gave a token that is expired"),
    ],
)
async def test_a_token_that_cannot_be_used_is_none(answer: object, message: str) -> None:
    """The function is named; what it was told stays with it, since that may hold a secret."""

    async def fetch() -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(NoTokenError, match=message) as caught:
        await Tokens(fetch, SYSTEM_CLOCK).current()
    assert "hunter2" not in str(caught.value)
    assert __name__ in str(caught.value)


async def test_an_issuer_that_is_away_is_not_noticed_while_the_last_token_counts() -> None:
    """A token in its last fifth is still one."""
    answers = [KafkaToken(SecretStr("old"), 100)]

    async def fetch() -> KafkaToken:
        return answers.pop()

    clock = VirtualClock()
    tokens = Tokens(fetch, clock)
    await tokens.current()
    await clock.advance(99)
    assert await tokens.current() == ("old", 1)
    await clock.advance(1)
    with pytest.raises(NoTokenError, match="IndexError"):
        await tokens.current()
