"""Connections that ask who is there: what is wrong is named, and what is right works as without."""

import asyncio
import os
import re
import ssl
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.protocol.admin import CreateAclsRequest
from pydantic import SecretStr

from mainstay.core import SYSTEM_CLOCK, App, ConfigurationError
from mainstay.core.testing import VirtualClock, eventually
from mainstay.database import DatabaseModule, DatabaseSettings
from mainstay.events import Event, EventPublisher, EventRouter, EventsModule, EventsSettings, KafkaToken
from mainstay.events._aiokafka import source as _source
from mainstay.events._aiokafka.connecting import why
from mainstay.events._kafka import KafkaTransport
from mainstay.events._kafka import watch as _watch
from mainstay.events._kafka.seam import Contact
from mainstay.events._kafka.tls import context_of
from mainstay.events._kafka.tokens import NoTokenError, Tokens
from mainstay_servers import SecureKafka
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
    assert EventsSettings().kafka_token is os.path.abspath  # type: ignore[comparison-overlap]  # any function will do
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


class Paid(Event, type="secure.paid", key="key"):
    key: str
    number: int


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks for what is missing once a second."""
    monkeypatch.setattr(_watch, "LOOK_SECONDS", 1.0)
    monkeypatch.setattr(_source, "LOOK_SECONDS", 1.0)


Ways = dict[str, dict[str, Any]]


def ways_of(kafka: SecureKafka) -> Ways:
    """How this service may show itself to each listener."""
    account = {"kafka_username": kafka.user, "kafka_password": kafka.password}
    tls = {"kafka_ca_file": str(kafka.ca_file)}
    certificate, key = map(str, kafka.locked_client_files)
    shown = {"kafka_certificate_file": certificate, "kafka_key_file": key, "kafka_key_password": kafka.key_password}

    async def fetch() -> KafkaToken:
        return KafkaToken(SecretStr(kafka.token(60)), 60)

    bearer = {"kafka_mechanism": "OAUTHBEARER", "kafka_token": fetch}
    scram = {"kafka_mechanism": "SCRAM-SHA-256"}
    return {
        "TLS": {"kafka_servers": kafka.address_of("SSL"), "kafka_protocol": "SSL", **tls},
        "mutual TLS": {"kafka_servers": kafka.address_of("MTLS"), "kafka_protocol": "SSL", **tls, **shown},
        "TLS and SCRAM": {
            "kafka_servers": kafka.address_of("SASL_SSL"), "kafka_protocol": "SASL_SSL", **tls, **account, **scram,
            "kafka_mechanism": "SCRAM-SHA-512",
        },
        "SCRAM": {
            "kafka_servers": kafka.address_of("SASL_PLAINTEXT"), "kafka_protocol": "SASL_PLAINTEXT", **account, **scram,
        },
        "PLAIN": {"kafka_servers": kafka.address_of("SASL_PLAINTEXT"), "kafka_protocol": "SASL_PLAINTEXT", **account},
        "TLS and tokens": {
            "kafka_servers": kafka.address_of("SASL_SSL"), "kafka_protocol": "SASL_SSL", **tls, **bearer,
        },
        "tokens": {
            "kafka_servers": kafka.address_of("SASL_PLAINTEXT"), "kafka_protocol": "SASL_PLAINTEXT", **bearer,
        },
    }  # fmt: skip


def service(way: dict[str, Any], topic: str, *routers: EventRouter, url: str | None = None, **more: Any) -> App:
    """An App on Kafka, behind the outbox where there is a database."""
    settings = EventsSettings(
        transport="kafka", outbox=url is not None, topics={"secure.paid": topic}, partitions=2, **way, **more
    )
    modules: list[Any] = [EventsModule.for_root(settings), EventsModule.for_feature(*routers)]
    if url is not None:
        modules.insert(0, DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url))))
    return App(*modules)


def counting(group: str) -> tuple[EventRouter, list[int]]:
    events = EventRouter()
    seen: list[int] = []

    @events.on(Paid, group=group)
    async def handle(event: Paid) -> None:
        seen.append(event.number)

    return events, seen


@pytest.mark.parametrize("way", ["TLS", "mutual TLS", "TLS and SCRAM", "SCRAM", "PLAIN", "TLS and tokens", "tokens"])
async def test_events_travel_however_the_listener_asks(secure_kafka: SecureKafka, prefix: str, way: str) -> None:
    """Published, handled, and handled by a second process that takes over half of it."""
    events, seen = counting(prefix)
    others, seen_there = counting(prefix)
    shown = ways_of(secure_kafka)[way]
    async with service(shown, prefix, events).running(serve=True) as app:
        await app.get(EventPublisher).publish_batch([Paid(key=str(number), number=number) for number in range(20)])
        await eventually(lambda: len(seen) == 20, seconds=60)
        async with service(shown, prefix, others).running(serve=True):
            number = 100
            async with asyncio.timeout(60):
                while not seen_there:
                    number += 1
                    await events.publish(Paid(key=str(number), number=number))
                    await asyncio.sleep(0.05)  # it takes seconds to join: a few at a time will do
            await eventually(lambda: len(set(seen + seen_there)) == number - 80, seconds=60)
        assert {report.status for report in (await app.health()).values()} == {"ok"}


async def test_a_connection_outlives_its_token(secure_kafka: SecureKafka, prefix: str) -> None:
    """The broker ends a connection with the token that opened it; the next one shows the next token."""
    asked = 0

    async def fetch() -> KafkaToken:
        nonlocal asked
        asked += 1
        return KafkaToken(SecretStr(secure_kafka.token(2)), 2)

    events, seen = counting(prefix)
    way = {**ways_of(secure_kafka)["tokens"], "kafka_token": fetch}
    published = 0
    async with service(way, prefix, events).running(serve=True) as app:
        async with asyncio.timeout(90):
            while asked < 4:
                await events.publish(Paid(key="a", number=published))
                published += 1
                await asyncio.sleep(0.2)  # as time passes the tokens grow old: that is what is tested
        await eventually(lambda: set(seen) == {*range(published)}, seconds=60)
        await eventually(lambda: _well(app), seconds=60)


async def _well(app: App) -> bool:
    return {report.status for report in (await app.health()).values()} == {"ok"}


async def no_token() -> KafkaToken:
    msg = "the secret of the client is hunter2"
    raise RuntimeError(msg)


def wrong_ways(kafka: SecureKafka) -> dict[str, tuple[dict[str, Any], str]]:
    """Each with what is said about it."""
    ways = ways_of(kafka)
    other = [*map(str, kafka.other_client_files)]
    expired = [*map(str, kafka.expired_client_files)]
    anonymous = {name: value for name, value in ways["mutual TLS"].items() if name not in SHOWN}

    async def stale() -> KafkaToken:
        return KafkaToken(SecretStr(kafka.token(-60)), 60)

    return {
        "another password": (
            {**ways["TLS and SCRAM"], "kafka_password": "hunter2"},
            f"refuses the account {kafka.user} .*KAFKA_PASSWORD",
        ),
        "another user": ({**ways["PLAIN"], "kafka_username": "bob"}, "refuses the account bob .*KAFKA_USERNAME"),
        "another authority": (
            {**ways["TLS"], "kafka_ca_file": str(kafka.other_ca_file)},
            "signed by none of the authorities .*KAFKA_CA_FILE",
        ),
        "an expired broker": (
            {**ways["TLS"], "kafka_servers": kafka.address_of("EXPIRED")},
            "certificate of 127.0.0.1:.* is out of date",
        ),
        "another name": (
            {**ways["TLS"], "kafka_servers": kafka.address_of("SSL").replace("127.0.0.1", "localhost")},
            "certificate of localhost:.* is for another name",
        ),
        "no certificate": (anonymous, "wants a certificate of this service: set .*KAFKA_CERTIFICATE_FILE"),
        "a certificate of another authority": (
            {**anonymous, "kafka_certificate_file": other[0], "kafka_key_file": other[1]},
            "does not take the certificate in .*KAFKA_CERTIFICATE_FILE",
        ),
        "an expired certificate": (
            {**anonymous, "kafka_certificate_file": expired[0], "kafka_key_file": expired[1]},
            "does not take the certificate in .*KAFKA_CERTIFICATE_FILE",
        ),
        "a listener with TLS": (
            {"kafka_servers": kafka.address_of("SSL")},
            "closes the connection instead of answering.*KAFKA_PROTOCOL than PLAINTEXT",
        ),
        "a listener without TLS": (
            {**ways["TLS"], "kafka_servers": kafka.address},
            "KAFKA_PROTOCOL",
        ),
        "a listener without accounts": (
            {**ways["TLS and SCRAM"], "kafka_servers": kafka.address_of("SSL")},
            "asks for no account: set .*KAFKA_PROTOCOL to SSL",
        ),
        "an old token": ({**ways["tokens"], "kafka_token": stale}, "does not take the token of .*stale"),
        "no token": ({**ways["tokens"], "kafka_token": no_token}, ":no_token gave no token: RuntimeError"),
        "nobody": ({"kafka_servers": "127.0.0.1:1"}, "nothing listens at 127.0.0.1:1"),
    }


def test_a_certificate_that_newer_pythons_do_not_take_is_no_matter_of_the_authority() -> None:
    """They insist on what RFC 5280 wants of one: another authority's file would not help."""
    refused = ssl.SSLCertVerificationError()
    refused.reason, refused.verify_code = "CERTIFICATE_VERIFY_FAILED", 85
    refused.verify_message = "Missing Authority Key Identifier"
    contact = Contact(EventsSettings(transport="kafka", kafka_servers="x:1"), SYSTEM_CLOCK)
    said = why(refused, contact, "x:1")
    assert "not as RFC 5280 has it" in said
    assert "Missing Authority Key Identifier" in said
    assert "CA_FILE" not in said


SHOWN = {"kafka_certificate_file", "kafka_key_file", "kafka_key_password"}
WRONG = [
    "another password", "another user", "another authority", "an expired broker", "another name", "no certificate",
    "a certificate of another authority", "an expired certificate", "a listener with TLS", "a listener without TLS",
    "a listener without accounts", "an old token", "no token", "nobody",
]  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
async def test_what_is_wrong_with_a_connection_is_named(
    secure_kafka: SecureKafka, prefix: str, sqlite_url: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """At a start that needs the broker; in log, health and check where the outbox does not; never with a secret."""
    way, message = wrong_ways(secure_kafka)[what]
    with pytest.raises(ConfigurationError, match=message) as caught:
        async with service(way, prefix):
            pass
    events, _ = counting(prefix)
    async with service(way, prefix, events, url=sqlite_url).running(serve=True) as app:
        await events.publish(Paid(key="a", number=1))

        async def named() -> bool:
            report = (await app.get(KafkaTransport).health()).detail
            return re.search(message, report) is not None and report.startswith("Kafka at ")

        await eventually(named, seconds=60)
        (module,) = [module for module in app.modules if isinstance(module, EventsModule)]
        found = await module.inspect(app)
        assert re.search(message, "\n".join(found))
        health = str(await app.health())
    lines = [record.getMessage() for record in caplog.records if record.name == "mainstay.events"]
    assert re.search(message, "\n".join(lines))
    said = "\n".join([str(caught.value), *found, health, caplog.text])
    assert "hunter2" not in said
    assert secure_kafka.password not in said


@pytest.mark.usefixtures("quick")
async def test_rights_that_are_missing_are_named_and_delay_no_other_topic(
    secure_kafka: SecureKafka, prefix: str, sqlite_url: str
) -> None:
    """A stranger may neither make, nor write, nor read, nor take part, until each right is granted."""
    events, seen = counting(prefix)
    way = {**ways_of(secure_kafka)["PLAIN"], "kafka_username": secure_kafka.stranger}
    async with service(way, prefix, events, url=sqlite_url).running(serve=True) as app:
        await events.publish(Paid(key="a", number=1))

        async def says(text: str) -> bool:
            return text in str(await app.health())

        await eventually(lambda: says(f"may not create the topic {prefix}"), seconds=60)
        await make(secure_kafka, prefix)
        await allow(secure_kafka, TOPIC, prefix, DESCRIBE)
        await eventually(lambda: says("may not write to any topic: grant WRITE"), seconds=60)
        await eventually(lambda: says(f"may not take part in the group mainstay.{prefix}: grant READ"), seconds=60)
        await make(secure_kafka, f"{prefix}-other")
        await allow(secure_kafka, TOPIC, f"{prefix}-other", WRITE)
        await eventually(lambda: says(f"may not write to the topic {prefix}: grant WRITE"), seconds=60)
        await allow(secure_kafka, TOPIC, prefix, WRITE)
        await allow(secure_kafka, GROUP, f"mainstay.{prefix}", READ)
        await eventually(lambda: says(f"may not read the topic {prefix}: grant READ"), seconds=60)
        await allow(secure_kafka, TOPIC, prefix, READ)
        await eventually(lambda: seen == [1], seconds=60)
        await eventually(lambda: _well(app), seconds=60)


READ, WRITE, DESCRIBE = 3, 4, 8
TOPIC, GROUP = 2, 3


async def make(kafka: SecureKafka, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.address)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, 2, 1)])
    finally:
        await admin.close()


async def allow(kafka: SecureKafka, kind: int, name: str, operation: int) -> None:
    """Grant a right to the stranger."""
    literal, allowed = 3, 3
    request = CreateAclsRequest(kind, name, literal, f"User:{kafka.stranger}", "*", operation, allowed)
    admin: Any = AIOKafkaAdminClient(bootstrap_servers=kafka.address)
    await admin.start()
    try:
        answer = await admin._send_to_controller(request)
        assert [code for code, _ in answer.creation_responses] == [0]
    finally:
        await admin.close()
