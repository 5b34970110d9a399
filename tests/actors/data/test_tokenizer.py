from __future__ import annotations

import hashlib
import json
import pickle

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from actors.data.tokenizer import ByteTokenizer, TokenizerError, load

WORDS = ["[UNK]", "hello", "world", "[CLS]"]


def build(folder, *specials, config=None):
    """A word-level tokenizer.json whose post-processor puts [CLS] in front, which packing must not have."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, *specials])}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 3)])
    made.add_special_tokens(["[CLS]", *specials])
    made.enable_truncation(2)
    made.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder / "tokenizer.json")


@pytest.mark.parametrize("text", ["héllo\n", "", "\x00\xff", "日本"])
def test_byte_round_trip(text):
    tokens = ByteTokenizer().encode(text)
    assert tokens.dtype == "int32" and tokens.tolist() == list(text.encode()) and ByteTokenizer().decode(tokens) == text


def test_byte_takes_bytes_that_are_not_text_and_drops_ends():
    byte = load("byte")
    assert byte.encode(b"\xff\xfe").tolist() == [255, 254]
    assert (byte.vocab_size, byte.end_of_document) == (257, 256)
    assert byte.decode([104, 256, 105]) == "hi" and byte.decode([255]) == "\ufffd"


def test_json_tokenizer(tmp_path):
    file = build(tmp_path, "</s>")
    for name in (file, str(tmp_path)):
        found = load(name)
        assert found.encode("hello world hello").tolist() == [1, 2, 1]
        assert found.encode(b"hello \xff").tolist() == [1, 0]
        assert (found.vocab_size, found.end_of_document) == (5, 4)
        assert found.fingerprint == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
        assert found.decode([1, 4, 2]) == "hello world"
        assert pickle.loads(pickle.dumps(found)).encode("world").tolist() == [2]


def test_a_document_cannot_forge_an_end(tmp_path):
    assert 4 not in load(build(tmp_path, "</s>")).encode("hello </s> world").tolist()


@pytest.mark.parametrize("specials, config, named, expected", [
    (["</s>", "<|endoftext|>"], None, "<|endoftext|>", 5), (["</s>", "<stop>"], {"eos_token": "<stop>"}, None, 5),
    (["</s>", "<stop>"], {"eos_token": {"content": "<stop>"}}, None, 5),
    (["</s>", "<stop>"], {"eos_token": "<stop>"}, "</s>", 4)])
def test_which_token_ends_a_document(tmp_path, specials, config, named, expected):
    assert load(build(tmp_path, *specials, config=config), named).end_of_document == expected


@pytest.mark.parametrize("specials, named, message", [
    ([], None, "found none of the customary names; name it with --end-token"),
    (["</s>", "<|endoftext|>"], None, r"found several \(<\|endoftext\|>, </s>\); name it"),
    (["</s>"], "<x>", "'<x>': not in the vocabulary")])
def test_an_unclear_end_is_refused(tmp_path, specials, named, message):
    with pytest.raises(TokenizerError, match=message):
        load(build(tmp_path, *specials), named)


def test_what_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(TokenizerError, match="not a tokenizer.json"):
        load(str(tmp_path / "x.json"))
    with pytest.raises(TokenizerError, match="does not exist; allowed: byte, or the path"):
        load(str(tmp_path / "none.json"))
    with pytest.raises(TokenizerError, match="has its own"):
        load("byte", "</s>")
