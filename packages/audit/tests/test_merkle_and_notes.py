"""The tree against its definition, notes against tampering, canonical JSON against its reference implementation."""

from base64 import b64decode, b64encode
from decimal import Decimal
from hashlib import sha256

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from mainstay.audit import Checkpoint, InvalidNote, SigningKey, VerifierKey, consistent, included
from mainstay.audit.entry import canonical
from mainstay.audit.merkle import (
    EMPTY_ROOT,
    Frontier,
    consistency_ranges,
    fold,
    inclusion_ranges,
    leaf_hash,
    node_hash,
    perfect,
    subtrees,
)
from mainstay.audit.note import open_note
from mainstay.audit.testing import KEY

LEAVES = [b"entry %d" % n for n in range(70)]


def tree_hash(data):
    """The definition in RFC 6962, section 2.1, word for word."""
    if not data:
        return sha256().digest()
    if len(data) == 1:
        return sha256(b"\x00" + data[0]).digest()
    k = 1
    while k * 2 < len(data):
        k *= 2
    return sha256(b"\x01" + tree_hash(data[:k]) + tree_hash(data[k:])).digest()


def proof_of(ranges):
    return [tree_hash(LEAVES[low:high]) for low, high in ranges]


def test_the_published_vectors():
    """Roots that other implementations of the same tree compute for the same eight leaves."""
    inputs = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
    tree = Frontier()
    assert tree.root().hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    for text in inputs:
        tree.append(leaf_hash(bytes.fromhex(text)))
    assert tree.root().hex() == "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"


def test_the_frontier_has_the_root_of_the_definition_at_every_size():
    """Growing leaf by leaf, from nothing or from any size, gives the same roots, and the nodes to store are right."""
    tree = Frontier()
    for size, data in enumerate(LEAVES):
        assert tree.root() == tree_hash(LEAVES[:size])
        peaks = [tree_hash(LEAVES[p << level : (p + 1) << level]) for level, p in subtrees(0, size)]
        assert Frontier(size, peaks).root() == tree.root() == fold(peaks)
        tree.append(leaf_hash(data))
    big, nodes = Frontier(), []
    for n in range(1 << 10):
        nodes += big.append(leaf_hash(b"%d" % n))
    assert [(node.level, node.position) for node in nodes] == [(8, 0), (8, 1), (8, 2), (8, 3)]
    assert nodes[1].hash == perfect([leaf_hash(b"%d" % n) for n in range(256, 512)])


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(0, 5000), st.integers(0, 5000))
def test_subtrees_cover_a_range_once(one, two):
    """Left to right, aligned, without overlap, and as few as can be."""
    low, high = min(one, two), max(one, two)
    at = low
    for level, position in subtrees(low, high):
        assert position << level == at
        at += 1 << level
    assert at == high
    assert len(subtrees(low, high)) <= 2 * (high - low).bit_length()


def test_every_inclusion_proof_proves_and_no_other():
    """For every leaf of every size; a proof that is cut, prolonged, moved or changed does not."""
    for size in range(1, 40):
        root = tree_hash(LEAVES[:size])
        for index in range(size):
            leaf, proof = leaf_hash(LEAVES[index]), proof_of(inclusion_ranges(index, size))
            assert included(leaf, index, size, proof, root)
            assert not included(leaf_hash(b"other"), index, size, proof, root)
            assert not included(leaf, index, size, [*proof, root], root)
            assert not included(leaf, index, size, proof, EMPTY_ROOT)
            if proof:
                assert not included(leaf, index, size, proof[:-1], root)
                assert not included(leaf, index, size, [EMPTY_ROOT, *proof[1:]], root)
            for other in {index - 1, index + 1, size} - {index}:
                assert not included(leaf, other, size, proof, root)


def test_trap_an_inner_node_is_no_leaf():
    """Without the prefixes the concatenation of two hashes would be a leaf with the hash of their parent."""
    left, right = leaf_hash(b"a"), leaf_hash(b"b")
    assert leaf_hash(left + right) != node_hash(left, right)


def test_every_consistency_proof_proves_and_no_other():
    """For every pair of sizes; another old root, another new root or a changed proof does not."""
    for new in range(40):
        for old in range(new + 1):
            proof = proof_of(consistency_ranges(old, new))
            old_root, new_root = tree_hash(LEAVES[:old]), tree_hash(LEAVES[:new])
            assert consistent(old, new, proof, old_root, new_root)
            if old != new:
                assert not consistent(new, old, proof, new_root, old_root)
            if old:
                assert not consistent(old, new, proof, leaf_hash(b"x"), new_root)
                assert not consistent(old, new, proof, old_root, leaf_hash(b"x"))
                assert not consistent(old, new, [*proof, new_root], old_root, new_root)
            if proof:
                assert not consistent(old, new, proof[1:], old_root, new_root)
    assert not consistent(3, 5, [], tree_hash(LEAVES[:3]), tree_hash(LEAVES[:5]))
    assert not consistent(-1, 5, [], EMPTY_ROOT, EMPTY_ROOT)


@pytest.mark.parametrize(
    "ask", [lambda: inclusion_ranges(3, 3), lambda: inclusion_ranges(-1, 3), lambda: consistency_ranges(4, 3)]
)
def test_proofs_that_cannot_be(ask):
    """A leaf outside of the tree and a tree that shrinks are programming errors."""
    with pytest.raises(ValueError, match="there is no"):
        ask()


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(max_codepoint=127), max_size=8), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(deadline=None)  # a busy machine is no failure
@given(st.dictionaries(st.text(st.characters(max_codepoint=127)), values))
def test_trap_canonical_json_is_rfc_8785(value):
    """Within the restricted schema our bytes are those of the reference implementation, whatever the strings hold."""
    assert canonical(value) == rfc8785.dumps(value)


def test_what_looks_like_a_string_or_a_number_is_written_as_one():
    """Subclasses lose their type, not their value."""

    class Name(str):
        __slots__ = ()

    class Count(int):
        pass

    assert (
        canonical({"a": Name("x"), "b": Count(3), "c": (1, 2), "d": Decimal("1.0")})
        == b'{"a":"x","b":3,"c":[1,2],"d":"1.0"}'
    )


def test_nesting_has_an_end():
    """A structure that contains itself is refused."""
    loop: dict[str, object] = {}
    loop["a"] = loop
    with pytest.raises(ValueError, match="nested"):
        canonical(loop)


def test_a_key_of_another_implementation():
    """A verifier key that another implementation of signed notes made has the id that we compute."""
    text = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
    assert VerifierKey.parse(text).text == text


def test_keys_come_back_from_their_text():
    """Both halves; and the repr of the private one shows nothing."""
    key = SigningKey.generate("orders.example.com/audit")
    assert SigningKey.parse(key.private_text() + "\n").private_text() == key.private_text()
    assert VerifierKey.parse(key.verifier.text).text == key.verifier.text
    assert key.private_text() not in repr(key)
    assert repr(key.verifier).startswith("<VerifierKey orders.example.com/audit+")


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\n"])
def test_names_of_keys(name):
    """A name that would break the line is refused."""
    with pytest.raises(InvalidNote, match="no name for a key"):
        SigningKey.generate(name)


def test_malformed_keys_are_refused_without_repeating_them():
    """A slip of the editor in a private key must not print it."""
    text = KEY.private_text()
    for wrong in (
        text[:-4],
        text.replace("PRIVATE", "PUBLIC"),
        text[:-1] + "!",
        KEY.verifier.text,
        text.replace("tests+", "tests+00"),
    ):
        with pytest.raises(InvalidNote) as caught:
            SigningKey.parse(wrong)
        assert text.split("+")[-1][:10] not in str(caught.value)
        assert caught.value.__cause__ is None
    parts = KEY.verifier.text.split("+", 2)
    for wrong in (
        "x",
        f"{parts[0]}+00000000+{parts[2]}",
        f"{parts[0]}+{parts[1]}+{b64encode(b'2' * 33).decode()}",
        text,
    ):
        with pytest.raises(InvalidNote):
            VerifierKey.parse(wrong)
    other = SigningKey.generate("other").private_text().split("+", 4)
    with pytest.raises(InvalidNote, match="does not belong"):
        SigningKey.parse("+".join([*other[:3], "00000000", other[4]]))


def test_notes():
    """Signed by one of the keys, with witnesses whom we do not know; anything else is refused."""
    other = SigningKey.generate("witness")
    note = KEY.sign("a\n\nb\n")
    line = other.sign("a\n\nb\n").rpartition("\n\n")[2]
    assert open_note(note + line, [KEY.verifier]) == ("a\n\nb\n", KEY.verifier)
    assert open_note(note + line, [other.verifier])[1] is other.verifier
    for wrong in (
        "",
        "a\n",
        note[:-1],
        note.replace("b\n", "c\n"),
        note.replace("— ", "- "),
        note + "— x !\n",
        note + "\n",
    ):
        with pytest.raises(InvalidNote):
            open_note(wrong, [KEY.verifier])
    with pytest.raises(InvalidNote, match="none of the known keys"):
        open_note(note, [other.verifier])
    forged = note.replace(
        b64encode(b64decode(note.split(" ")[-1])).decode(), b64encode(KEY.verifier.id + b"0" * 64).decode()
    )
    with pytest.raises(InvalidNote, match="did not make"):
        open_note(forged + line, [KEY.verifier, other.verifier])


def test_checkpoints():
    """They come back; another text, another root length and the key of another log are refused."""
    checkpoint = Checkpoint(KEY.verifier.name, 3, b"r" * 32, "2026-01-01T00:00:00Z")
    assert Checkpoint.open(KEY.sign(checkpoint.to_text()), [KEY.verifier]) == checkpoint
    for wrong in (
        "hello\n",
        checkpoint.to_text() + "more\n",
        checkpoint.to_text().replace("\n3\n", "\n03\n"),
        checkpoint.to_text().replace("time ", ""),
        Checkpoint(KEY.verifier.name, 3, b"short", "t").to_text(),
    ):
        with pytest.raises(InvalidNote, match="no checkpoint"):
            Checkpoint.open(KEY.sign(wrong), [KEY.verifier])
    other = SigningKey.generate("producer")
    with pytest.raises(InvalidNote, match="another log"):
        Checkpoint.open(other.sign(checkpoint.to_text()), [KEY.verifier, other.verifier])
