import json
from collections import Counter

import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dsv3_mini.data import (
    BOS,
    EOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    SPECIAL_TOKENS,
    Batches,
    bits_per_byte,
    boundary_pieces,
    digest,
    encode,
    encode_bytes,
    fill_in_the_middle,
    folder_corpus,
    pack,
    python_corpus,
    split_boundary_tokens,
    token_bytes,
    token_ids,
    train_tokenizer,
)

TEXTS = [
    "def f(x):\n    return {x: 12345}\n" * 30,
    "Naïve 東京。\r\n“quoted”;\n\n if a != b:\n\tprint('no!')\n" * 20,
    "x  \n" * 50,
]
TOKENIZER = train_tokenizer(TEXTS, 400)
TABLE = token_bytes(TOKENIZER)
DOCUMENTS = st.lists(st.lists(st.integers(5, 99), max_size=9), min_size=1, max_size=9)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def joined(ids):
    return b"".join(TABLE[i] for i in ids)


def write(folder, texts):
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(text.encode())
    return folder


FILES = {f"{'ab'[i % 2]}/{i}.py": f"x = {i}\n" * (i % 7 + 1) for i in range(40)}


# corpora


def test_split_by_file_loses_nothing_and_shares_nothing(tmp_path):
    corpus = folder_corpus(write(tmp_path, FILES))
    assert sorted(corpus.train + corpus.valid) == sorted(FILES.values())
    assert not set(corpus.train) & set(corpus.valid) and corpus.valid
    sizes = [sum(map(len, part)) for part in (corpus.train, corpus.valid)]
    assert 0.02 < sizes[1] / sum(sizes) < 0.11


def test_the_digest_follows_the_texts_and_not_the_folder(tmp_path):
    here, there = (folder_corpus(write(tmp_path / name, FILES)) for name in ("here", "there"))
    assert (here.train, here.valid, here.sha256) == (there.train, there.valid, there.sha256)
    changed = folder_corpus(write(tmp_path / "changed", FILES | {"a/6.py": "x = 6 \n"}))
    assert changed.sha256 != here.sha256
    assert folder_corpus(tmp_path / "here", max_bytes=200).sha256 != here.sha256


def test_the_digest_tells_where_a_text_and_the_training_part_end():
    splits = ((["ab"], ["c"]), (["a"], ["bc"]), (["ab", "c"], []), (["c"], ["ab"]))
    assert len({digest(*split) for split in splits}) == 4


def test_max_bytes_keeps_whole_files(tmp_path):
    corpus = folder_corpus(write(tmp_path, FILES), max_bytes=300)
    kept = corpus.train + corpus.valid
    assert set(kept) <= set(FILES.values()) and 250 < sum(map(len, kept)) <= 300


def test_hidden_empty_and_repeated_files_stay_out(tmp_path):
    extra = {".git/x.py": "hidden", "a/.b.py": "hidden", "a/e.py": "", "b/copy.py": FILES["a/0.py"], "c.bin": "binary"}
    corpus = folder_corpus(write(tmp_path, FILES | extra))
    assert sorted(corpus.train + corpus.valid) == sorted(FILES.values())


def test_line_ends_survive_and_stray_bytes_are_replaced(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"a\r\nb\r\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 and more than the other")
    corpus = folder_corpus(tmp_path)
    assert corpus.valid == ["a\r\nb\r\n"] and corpus.train == ["caf� and more than the other"]


def test_python_corpus_is_the_library_without_its_tests():
    corpus = python_corpus(max_bytes=400_000)
    assert corpus == python_corpus(max_bytes=400_000) and len(corpus.sha256) == 64
    assert not any("import unittest" in text and "test.support" in text for text in corpus.train)


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        folder_corpus(tmp_path / "nowhere")
    (tmp_path / "only.txt").write_text("one file")
    with pytest.raises(ValueError, match="only.txt is a file"):
        folder_corpus(tmp_path / "only.txt")
    with pytest.raises(ValueError, match="1 usable files"):
        folder_corpus(tmp_path)
    with pytest.raises(ValueError, match="0 usable files"):
        folder_corpus(tmp_path, patterns=["*.none"])


def test_one_pattern_is_not_read_letter_by_letter(tmp_path):
    write(tmp_path, {"a.py": "x", "b.py": "yy", "c.bin": "binary", "p": "a name that is one letter"})
    corpus = folder_corpus(tmp_path, patterns="*.py")
    assert sorted(corpus.train + corpus.valid) == ["x", "yy"]


# tokens


def test_one_text_is_not_read_letter_by_letter():
    for ask in (lambda: train_tokenizer("abc", 300), lambda: token_ids(TOKENIZER, "abc")):
        with pytest.raises(ValueError, match="texts is one string; a list of texts is needed"):
            ask()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_survive_the_round_trip(data):
    assert joined(encode_bytes(TOKENIZER, data)) == data


def test_a_saved_tokenizer_is_the_same(tmp_path):
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    back, text = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), "f(12) = naïve 東京;\n"
    assert token_ids(back, [text]) == token_ids(TOKENIZER, [text]) and token_bytes(back) == TABLE


def test_training_twice_gives_the_same_tokenizer():
    again = train_tokenizer(TEXTS, 400)
    assert json.loads(again.to_str()) == json.loads(TOKENIZER.to_str())
    assert [again.token_to_id(token) for token in SPECIAL_TOKENS] == [BOS, EOS, FIM_HOLE, FIM_BEGIN, FIM_END]
    assert sorted(TABLE[5:261]) == [bytes([byte]) for byte in range(256)]


PUBLISHED = (  # as in the tokenizer.json of DeepSeek-V3
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)


def published_cut(text):
    """The three patterns one after the other, each match a piece, and what lies between as well."""
    pieces = [text]
    for pattern in PUBLISHED:
        found = [regex.split(f"({pattern})", piece) for piece in pieces]
        pieces = [part for parts in found for part in parts if part]
    return pieces


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab Zé东あ7٣_.:(—€\n\r\t\u3000\u0301😀"), max_size=25))
def test_the_cuts_are_the_published_ones(text):
    assert [text[a:b] for _, (a, b) in TOKENIZER.pre_tokenizer.pre_tokenize_str(text)] == published_cut(text)


def test_digits_are_cut_in_threes_and_no_merge_crosses():
    tokenizer = train_tokenizer(["12345678 " * 50], 300)
    assert [tokenizer.decode([i]) for i in token_ids(tokenizer, ["12345678"])[0]] == ["123", "456", "78"]
    assert not [token for token in token_bytes(tokenizer) if sum(chr(byte).isdigit() for byte in token) > 3]


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_the_name_of_a_special_token_is_ordinary_text(name):
    text = f"a {name} b{name}"
    assert min(token_ids(TOKENIZER, [text])[0]) >= len(SPECIAL_TOKENS)
    assert joined(encode(TOKENIZER, [text])[0]) == text.encode()
    assert TOKENIZER.encode(name).ids == [SPECIAL_TOKENS.index(name)]  # the library's own switch is put back


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size=260 must be at least 261"):
        train_tokenizer(TEXTS, 260)
    assert train_tokenizer(TEXTS, 261).get_vocab_size() == 261


def test_bits_per_byte_of_a_fair_coin():
    assert bits_per_byte(torch.tensor(2.0).log().item(), n_tokens=24, n_bytes=8) == pytest.approx(3)
    with pytest.raises(ValueError, match="n_bytes=0"):
        bits_per_byte(1.0, 1, 0)


# splitting and moving


def test_only_punctuation_with_its_line_break_is_split():
    pieces = boundary_pieces(TOKENIZER)
    assert {b"):\n", b"}\n", "。\r\n".encode()} <= {TABLE[i] for i in pieces}
    assert b"  \n" in TABLE and TABLE.index(b"  \n") not in pieces
    for i, halves in pieces.items():
        assert joined(halves) == TABLE[i] and TABLE[i].strip() and TABLE[i][-1:] in (b"\r", b"\n")
        assert not set(halves) & pieces.keys()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["):\n", "x", ";\n\n", " =", "\n", "  \n"]), max_size=40), st.floats(0, 1))
def test_splitting_keeps_the_bytes(parts, rate):
    pieces, ids = boundary_pieces(TOKENIZER), token_ids(TOKENIZER, ["".join(parts)])[0]
    split = split_boundary_tokens(ids, pieces, generator(), rate)
    assert joined(split) == "".join(parts).encode()
    assert split_boundary_tokens(ids, pieces, generator(), 0.0) == ids
    assert not set(split_boundary_tokens(ids, pieces, generator(), 1.0)) & pieces.keys()


def test_the_rates_are_shares():
    pieces = boundary_pieces(TOKENIZER)
    boundary, halves = next(iter(pieces.items()))
    split = split_boundary_tokens([boundary] * 4000, pieces, generator(), 0.25)
    assert 0.22 < Counter(split)[halves[-1]] / 4000 < 0.28
    moved = [fill_in_the_middle([9], generator(seed), 0.1)[0] == FIM_BEGIN for seed in range(4000)]
    assert 0.08 < sum(moved) / 4000 < 0.12


@given(st.lists(st.integers(5, 999), max_size=20), st.integers(0, 10**6))
def test_a_moved_middle_can_be_put_back(ids, seed):
    begin, *rest = fill_in_the_middle(ids, generator(seed), rate=1.0)
    hole, end = rest.index(FIM_HOLE), rest.index(FIM_END)
    assert begin == FIM_BEGIN and Counter(rest) == Counter([*ids, FIM_HOLE, FIM_END])
    assert rest[:hole] + rest[end + 1 :] + rest[hole + 1 : end] == ids
    assert fill_in_the_middle(ids, generator(seed), rate=0.0) == ids


def test_middles_of_every_place_are_drawn():
    places = {
        (out.index(FIM_HOLE), out.index(FIM_END))
        for seed in range(500)
        for out in [fill_in_the_middle([7, 8], generator(seed), rate=1.0)]
    }
    assert places == {(1, 4), (1, 3), (1, 2), (2, 4), (2, 3), (3, 4)}


def test_the_layout_is_the_published_one_and_its_end_token_closes_the_middle():
    moved = encode(TOKENIZER, ["print(12345)"], fim_rate=1.0)[0]
    row = pack([moved], seq_len=len(moved) + 1)[0].tolist()
    assert [i for i in row if i < len(SPECIAL_TOKENS)] == [BOS, FIM_BEGIN, FIM_HOLE, FIM_END, EOS]
    assert row[:2] == [BOS, FIM_BEGIN] and row[-1] == EOS


def test_encoding_depends_on_its_seed_alone():
    options = dict(fim_rate=0.5, split_rate=0.5)
    assert encode(TOKENIZER, TEXTS, seed=1, **options) == encode(TOKENIZER, TEXTS, seed=1, **options)
    assert encode(TOKENIZER, TEXTS, seed=1, **options) != encode(TOKENIZER, TEXTS, seed=2, **options)
    assert encode(TOKENIZER, TEXTS) == token_ids(TOKENIZER, TEXTS)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_that_is_no_share_is_refused(rate):
    with pytest.raises(ValueError, match="^rate="):
        fill_in_the_middle([5, 6], generator(), rate)
    with pytest.raises(ValueError, match="^split rate="):
        encode(TOKENIZER, TEXTS, split_rate=rate)


# windows and batches


@given(DOCUMENTS, st.integers(1, 7), st.booleans())
def test_each_token_but_the_first_is_predicted_once_and_in_order(documents, seq_len, marked):
    marks = {} if marked else {"bos_token_id": None, "eos_token_id": None}
    stream = [t for ids in documents for t in ([BOS, *ids, EOS] if marked else ids)]
    if len(stream) < seq_len + 1:
        with pytest.raises(ValueError, match=f"{len(stream)} tokens do not fill"):
            pack(documents, seq_len, **marks)
        return
    windows = pack(documents, seq_len, **marks)
    predicted = windows[:, 1:].flatten().tolist()
    assert predicted == stream[1 : len(predicted) + 1] and len(stream) - 1 - len(predicted) < seq_len
    assert windows[:, :-1].flatten().tolist() == stream[: len(predicted)]


@pytest.mark.parametrize("seq_len", [0, -3])
def test_a_window_needs_a_length(seq_len):
    with pytest.raises(ValueError, match=f"seq_len={seq_len}"):
        pack([[5, 6, 7]], seq_len)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 99))
def test_an_epoch_covers_the_windows(n_windows, batch_size, seed):
    batch_size = min(batch_size, n_windows)
    batches = Batches(torch.arange(n_windows)[:, None], batch_size, seed)
    for epoch in (0, 3):
        steps = range(epoch * len(batches), (epoch + 1) * len(batches))
        seen = torch.cat([batches.batch(step) for step in steps]).flatten().tolist()
        assert len(seen) == len(set(seen)) == n_windows // batch_size * batch_size


def test_a_batch_is_a_function_of_seed_and_step():
    windows = torch.arange(50)[:, None]
    batches = Batches(windows, 5, seed=3)
    straight = [batches.batch(step) for step in range(30)]
    assert all(torch.equal(Batches(windows, 5, seed=3).batch(step), straight[step]) for step in (29, 4, 17))
    assert not torch.equal(straight[0], straight[len(batches)])
    assert not torch.equal(straight[0], Batches(windows, 5, seed=4).batch(0))


def test_impossible_batches_are_refused():
    windows = torch.zeros(4, 3)
    for size in (0, 5):
        with pytest.raises(ValueError, match=f"batch_size={size} must lie in 1..4"):
            Batches(windows, size)
    with pytest.raises(ValueError, match="step=-1"):
        Batches(windows, 2).batch(-1)
