"""Mutants of a module of a few lines, and what tests of it notice."""

from __future__ import annotations

import ast
import tempfile

import pytest

from tests import mutants
from tests.mutants import TestsFail, drawn, mutated, tried

SOURCE = '''"""1 < 2 and min."""
@mark(True)
def least(a: List[1], b, *, loud=False):
    # 1
    if a < b <= 3 and a is not None or "x" in b:
        print(a)
    total = min(a + 1, b)
    self.seen, self.last = total, b
    total -= b
    if a != b:
        return
    return total
'''
MADE = """
s.py:3  False -> True
s.py:5  a < b <= 3 and a is not None or 'x' in b -> (a < b <= 3 and a is not None) and 'x' in b
s.py:5  a < b <= 3 and a is not None or 'x' in b -> (a < b <= 3 or a is not None) or 'x' in b
s.py:5  a < b <= 3 and a is not None -> a <= b <= 3 and a is not None
s.py:5  a < b <= 3 and a is not None -> a < b < 3 and a is not None
s.py:5  a < b <= 3 -> a < b <= 4
s.py:5  a < b <= 3 and a is not None -> a < b <= 3 and a is None
s.py:5  a < b <= 3 and a is not None or 'x' in b -> a < b <= 3 and a is not None or 'x' not in b
s.py:6  print(a) -> ...
s.py:7  min(a + 1, b) -> max(a + 1, b)
s.py:7  min(a + 1, b) -> min(a - 1, b)
s.py:7  a + 1 -> a + 2
s.py:8  self.seen, self.last = (total, b) -> self.seen, self.last = self.seen, self.last
s.py:9  total -= b -> total += b
s.py:10  a != b -> a == b
s.py:12  return total -> return None
"""
COUNT = '''def count(words):
    found = 0
    for word in words:
        if word != "":
            found += 1
    return found


def sign(value):
    return value > 0
'''
TESTS = '''from count import count, sign


def test_count():
    assert count(['a', '', 'b']) == 2 and sign(1) and not sign(-1)
'''


def test_all_mutants_of_a_module():
    """Neither text, comments, decorators and annotations, nor a return of nothing."""
    assert "\n".join(map(str, mutants.mutants("s.py", SOURCE))) == MADE.strip()


def test_a_mutant_is_one_change_and_can_be_read():
    texts = [mutated(SOURCE, mutant) for mutant in mutants.mutants("s.py", SOURCE)]
    plain = ast.unparse(ast.parse(SOURCE)).splitlines()
    assert len(set(texts)) == len(texts)
    for text in texts:
        ast.parse(text)
        lines = text.splitlines()
        assert len(lines) == len(plain) and sum(one != other for one, other in zip(lines, plain)) == 1


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository of its own, whose folder for what passes is seen as well."""
    root, passing = tmp_path / "tree", tmp_path / "passing"
    for folder in (root / "room", passing):
        folder.mkdir(parents=True)
    (root / "count.py").write_text(COUNT)
    (root / "test_count.py").write_text(TESTS)
    (root / "room" / "other.py").write_text("ONE = True\n")
    monkeypatch.setattr(tempfile, "tempdir", str(passing))
    monkeypatch.setattr(mutants, "REPOSITORY", root)
    yield root
    assert not list(passing.iterdir()) and (root / "count.py").read_text() == COUNT


def test_only_the_seed_decides_the_order(tree):
    first = drawn(tree, ["count.py", "room"], 1)
    assert first == drawn(tree, ["room", "count.py"], 1) != drawn(tree, ["count.py", "room"], 2)
    assert {mutant.room for mutant in first} == {".", "room"}
    assert list(map(str, drawn(tree, ["room"], 1))) == ["room/other.py:1  ONE = True -> ONE = False"]
    assert sorted(map(str, drawn(tree, ["count.py"], 2))) == sorted(map(str, mutants.mutants("count.py", COUNT)))


def test_who_is_noticed_and_who_is_not(tree, capsys):
    """Of what a room's tests never touch, everything lives."""
    arguments = ["count.py", "room", "--tests", "test_count.py", "--seed", "3"]
    assert mutants.main(arguments) == 1
    said = capsys.readouterr().out
    assert said.splitlines() == [
        ".: killed 7 of 8", "room: killed 0 of 1", "count.py:10  return value > 0 -> return value >= 0",
        "room/other.py:1  ONE = True -> ONE = False"]
    (tree / "test_count.py").write_text(TESTS.replace("sign(-1)", "sign(0)"))
    (tree / "before.txt").write_text(said)
    assert mutants.main([*arguments, "--only", str(tree / "before.txt")]) == 1
    assert capsys.readouterr().out.startswith(".: killed 1 of 1\nroom: killed 0 of 1\nroom/other.py:1  ")


def test_what_never_ends_is_killed(tree, monkeypatch):
    (tree / "wait.py").write_text("def down(n):\n    while n:\n        n -= 1\n    return n\n")
    (tree / "test_wait.py").write_text("from wait import down\n\n\ndef test_down():\n    assert down(3) == 0\n")
    monkeypatch.setattr(mutants, "_LEAST_SECONDS", 4.0)
    monkeypatch.setattr(mutants, "_TIMES", 0.0)
    up = drawn(tree, ["wait.py"], 0, ["wait.py:3  n -= 1 -> n += 1"])
    assert len(up) == 1 and tried(tree, up, ["test_wait.py"], 60.0) == mutants.Result(tuple(up), ())


def test_no_time_no_mutants(tree):
    assert tried(tree, drawn(tree, ["count.py"], 0), ["test_count.py"], 0.0).made == ()


def test_tests_that_fail_as_it_is_say_nothing_of_mutants(tree, capsys):
    (tree / "test_count.py").write_text(TESTS.replace("== 2", "== 3"))
    with pytest.raises(TestsFail, match="^the tests do not pass as it is .pytest: 1"):
        tried(tree, drawn(tree, ["count.py"], 0), ["test_count.py"], 60.0)
    assert mutants.main(["count.py", "--tests", "nowhere"]) == 2 and "pytest: 4" in capsys.readouterr().err
