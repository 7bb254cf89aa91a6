"""Apache Kafka with listeners that ask who is there: TLS, mutual TLS, SASL, and rights by account.

Keys, certificates and passwords are made at the start and deleted with the server's directory.
"""

import base64
import ipaddress
import json
import secrets
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mainstay_servers.kafka import Kafka
from mainstay_servers.process import free_port

_PROTOCOLS = {
    "PLAINTEXT": "PLAINTEXT",
    "SSL": "SSL",
    "MTLS": "SSL",
    "EXPIRED": "SSL",
    "SASL_SSL": "SASL_SSL",
    "SASL_PLAINTEXT": "SASL_PLAINTEXT",
}
_DAY = timedelta(days=1)


class Authority:
    """A certificate authority, made anew, and what it signs.

    Args:
        directory: where it writes its files.
        name: its name, and the beginning of theirs.

    Attributes:
        file: its certificate, in PEM form.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._name = name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = _called(name)
        certificate = (
            _certificate(
                self._subject, self._subject, self._key.public_key(), self._key.public_key(), since=-_DAY, until=_DAY
            )
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_SIGNS, critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.file = directory / f"{name}.pem"
        self.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def sign(self, name: str, *, until: timedelta = _DAY, password: str | None = None) -> tuple[Path, Path]:
        """Write a key and its certificate for `name` on 127.0.0.1; return the files of certificate and key."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _certificate(
                _called(name), self._subject, key.public_key(), self._key.public_key(), since=-2 * _DAY, until=until
            )
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )
        files = (self._directory / f"{self._name}-{name}.crt", self._directory / f"{self._name}-{name}.key")
        files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        files[1].touch(mode=0o600)
        files[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption()
                if password is None
                else serialization.BestAvailableEncryption(password.encode()),
            )
        )
        return files


def _called(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


_SIGNS = x509.KeyUsage(
    key_cert_sign=True,
    crl_sign=True,
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    encipher_only=False,
    decipher_only=False,
)


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePublicKey,
    *,
    since: timedelta,
    until: timedelta,
) -> x509.CertificateBuilder:
    # With all that RFC 5280 wants of it: Python 3.13 and later insist on that.
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + since)
        .not_valid_after(now + until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


class SecureKafka(Kafka):
    """A single-node Kafka that checks who connects, and what they may.

    `address` stays the listener without any of that, for tools: who comes by it may do everything, as may `user` by
    each mechanism and the certificate of `client_files`. `stranger` has no right but those that a test grants.

    Attributes:
        user, stranger: accounts of PLAIN and both SCRAM.
        password: of both.
        key_password: of the key in `locked_client_files`.
        ca_file: the authority of the broker and its clients.
        client_files: certificate and key of a client, `CN=orders`.
        locked_client_files: the same with a password on the key.
        expired_client_files: such a certificate of yesterday.
        other_ca_file: an authority that has signed nothing here.
        other_client_files: certificate and key that it signed.
    """

    user = "orders"
    stranger = "stranger"

    def __init__(self) -> None:
        super().__init__()
        self._ports = {name: self.port if name == "PLAINTEXT" else free_port() for name in _PROTOCOLS}
        self.password = secrets.token_urlsafe(16)
        self.key_password = secrets.token_urlsafe(16)

    def address_of(self, listener: str) -> str:
        """Return the address of a listener: `SSL`, `MTLS`, `SASL_SSL`, `SASL_PLAINTEXT`, or `EXPIRED`.

        `EXPIRED` has a certificate of yesterday. Those of the others are for 127.0.0.1, and for no other name of it.
        """
        return f"127.0.0.1:{self._ports[listener]}"

    def token(self, seconds: float, subject: str | None = None) -> str:
        """Return a token for OAUTHBEARER that the broker takes for so long: an unsigned JSON Web Token."""
        now = time.time()
        # Issued at a whole second, as by any authority: the broker counts milliseconds, and one that is later than
        # the one that it has right now is in its future.
        claims = {"sub": subject or self.user, "iat": int(now), "exp": now + seconds}
        parts = [_base64(json.dumps(part).encode()) for part in ({"alg": "none"}, claims)]
        return ".".join([*parts, ""])

    def listeners(self) -> dict[str, int]:
        """See `Kafka`."""
        return self._ports

    def prepare(self) -> None:
        """Make authorities and certificates, and all that every Kafka needs."""
        own, other = Authority(self.directory, "authority"), Authority(self.directory, "other")
        self.ca_file, self.other_ca_file = own.file, other.file
        self._broker_files = own.sign("broker")
        self._expired_files = own.sign("expired-broker", until=-_DAY)
        self.client_files = own.sign(self.user)
        self.locked_client_files = own.sign("locked", password=self.key_password)
        self.expired_client_files = own.sign("expired", until=-_DAY)
        self.other_client_files = other.sign(self.user)
        super().prepare()

    def more_properties(self) -> str:
        """See `Kafka`."""
        lines = [
            "listener.security.protocol.map=CONTROLLER:PLAINTEXT,"
            + ",".join(f"{name}:{protocol}" for name, protocol in _PROTOCOLS.items()),
            "ssl.keystore.type=PEM",
            "ssl.truststore.type=PEM",
            f"ssl.truststore.location={self.ca_file}",
            "listener.name.mtls.ssl.client.auth=required",
            "sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER",
            "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            f"super.users=User:ANONYMOUS;User:{self.user};User:CN={self.user};User:CN=locked",
        ]
        for listener, protocol in _PROTOCOLS.items():
            prefix = f"listener.name.{listener.lower()}"
            if protocol.endswith("SSL"):
                files = self._expired_files if listener == "EXPIRED" else self._broker_files
                lines.append(f"{prefix}.ssl.keystore.location={self._keystore(*files)}")
            if protocol.startswith("SASL"):
                lines += self._accounts(prefix)
        return "\n".join(lines)

    def _keystore(self, certificate: Path, key: Path) -> Path:
        """Return the file in which Kafka wants a key and its certificate."""
        both = key.with_suffix(".both")
        both.touch(mode=0o600)
        both.write_bytes(key.read_bytes() + certificate.read_bytes())
        return both

    def _accounts(self, prefix: str) -> list[str]:
        modules = "org.apache.kafka.common.security"
        plain = " ".join(f'user_{user}="{self.password}"' for user in (self.user, self.stranger))
        scram = f"{modules}.scram.ScramLoginModule required;"
        bearer = f'{modules}.oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub="broker";'
        # A connection lasts as long as the token that it was opened with.
        return [
            f"{prefix}.plain.sasl.jaas.config={modules}.plain.PlainLoginModule required {plain};",
            f"{prefix}.scram-sha-256.sasl.jaas.config={scram}",
            f"{prefix}.scram-sha-512.sasl.jaas.config={scram}",
            f"{prefix}.oauthbearer.sasl.jaas.config={bearer}",
            f"{prefix}.oauthbearer.connections.max.reauth.ms=3600000",
        ]

    def more_format_arguments(self) -> Sequence[str]:
        """See `Kafka`."""
        return [
            argument
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
            for user in (self.user, self.stranger)
            for argument in ("--add-scram", f"{mechanism}=[name={user},password={self.password}]")
        ]


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
