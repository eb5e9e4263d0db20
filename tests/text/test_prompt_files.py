"""Files of captions: what is read, counted, and refused by file and line."""

import hashlib
import json

import pytest

from omniforcing_jax.text import prompt_files
from omniforcing_jax.text.prompt_files import prompt_hash, read_prompts


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text(tmp_path):
    content = (
        "\ufeffa calm sea\r\n\n  a storm 😀 \na calm sea\n \t\nodd \u2028 line\x0bends\na storm 😀"
    )
    prompts = read_prompts(write(tmp_path / "captions.txt", content))
    assert prompts.prompts == ("a calm sea", "a storm 😀", "odd \u2028 line\x0bends")
    assert prompts.lines == (1, 3, 6)
    assert (prompts.num_read, prompts.num_blank, prompts.num_duplicates) == (7, 2, 2)


def test_csv(tmp_path):
    content = (
        'clip,caption\n1,a calm sea\n2,"waves, and\nfoam"\n3,"say ""hi"""\n4,\n\n5, a calm sea \n'
    )
    prompts = read_prompts(write(tmp_path / "captions.CSV", content))
    assert prompts.prompts == ("a calm sea", "waves, and\nfoam", 'say "hi"')
    assert prompts.lines == (2, 3, 5)  # the line a caption begins in, also after one of two lines
    assert (prompts.num_read, prompts.num_blank, prompts.num_duplicates) == (6, 2, 1)
    assert read_prompts(tmp_path / "captions.CSV", "clip").prompts == ("1", "2", "3", "4", "5")


def test_jsonl(tmp_path):
    rows = [{"text": "a calm sea", "id": 1}, {"text": "two\nlines"}, {"text": "a calm sea"}]
    lines = [json.dumps(row) for row in rows] + ["", '{"text": "\\ud83d\\ude00", "id": null}']
    prompts = read_prompts(write(tmp_path / "captions.jsonl", "\n".join(lines)), "text")
    assert prompts.prompts == ("a calm sea", "two\nlines", "😀") and prompts.lines == (1, 2, 5)
    assert (prompts.num_read, prompts.num_blank, prompts.num_duplicates) == (5, 1, 1)


def test_long_captions(tmp_path):
    words = " ".join(f"word{i}" for i in range(10_000))
    for name, content in {
        "captions.txt": f"short\n{words}\n",
        "captions.csv": f'caption\nshort\n"{words}"\n',
        "captions.jsonl": '{"caption": "short"}\n' + json.dumps({"caption": words}),
    }.items():
        assert read_prompts(write(tmp_path / name, content)).prompts == ("short", words)


def test_hashes(tmp_path):
    assert prompt_hash(" é\n") == hashlib.sha256("é".encode()).hexdigest()
    contents = ("a\nb\n", "a\n\nb\na", "b\na\n", "ab\n", "a b\n")
    hashes = [read_prompts(write(tmp_path / "x.txt", content)).sha256 for content in contents]
    # blank and repeated lines do not matter, the order and the ends of the prompts do
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.txt", b"fine\n\xe4rger\n", r"x\.txt, line 2: byte 1 \(0xe4\) is not UTF-8.*iconv"),
        ("x.txt", "utf 16".encode("utf-16"), "line 1: byte 1 .* not UTF-8"),
        ("x.csv", b"caption\nfine\nna\xefve\n", "line 3: byte 3 .* not UTF-8"),
        ("x.jsonl", b'{"caption": "a"}\n{"caption": "\xff"}', "line 2: byte 14 .* not UTF-8"),
        ("x.txt", "", r"no captions \(0 read, 0 of them blank\)"),
        ("x.txt", "\n \n", r"no captions \(2 read, 2 of them blank\)"),
        ("x.csv", "", "line 1: no column 'caption'.*found nothing"),
        ("x.csv", "text,id\na,1\n", "line 1: no column 'caption'.*found 'text', 'id'"),
        ("x.csv", "caption,caption\na,1\n", "line 1: more than one column 'caption'"),
        ("x.csv", "id,caption\n1,a\n2,b, c\n", "line 3: 3 fields, the header has 2.*quotes"),
        ("x.csv", "id,caption\n1\n", "line 2: 1 fields"),
        ("x.csv", 'caption\n"a\nb\n', "line 3: broken CSV"),
        ("x.jsonl", '{"caption": "a"}\n{"caption": "b"', "line 2: broken JSON"),
        ("x.jsonl", '["a"]', "line 1: a JSON list; expected an object"),
        ("x.jsonl", '{"caption": "a"}\n\n{"text": "b"}', "line 3: no key 'caption', found 'text'"),
        ("x.jsonl", '{"caption": "a"}\n{"caption": 3}', "line 2: 'caption' is 3; expected a str"),
        ("x.jsonl", '{"caption": null}', "line 1: 'caption' is null"),
        ("x.jsonl", r'{"caption": "half \ud83d"}', "line 1: 'caption' is not valid Unicode"),
        ("x.parquet", b"PAR1", r"\.txt, \.csv, \.jsonl files, not '\.parquet'"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(write(tmp_path / name, content))


def test_a_quote_that_never_ends_is_found(tmp_path):
    path = write(tmp_path / "x.csv", 'caption\n"a\n' + "b\n" * 100_000)
    with pytest.raises(ValueError, match="broken CSV"):
        read_prompts(path)


def test_wrong_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file of captions"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="no columns; leave out column 'caption'"):
        read_prompts(write(tmp_path / "x.txt", "a"), prompt_files.DEFAULT_COLUMN)
