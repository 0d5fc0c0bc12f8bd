from __future__ import annotations

import ast
import platform
import re
import sysconfig
import warnings
from pathlib import Path

import pytest

from evolkv.errors import TaskError
from evolkv.evaluation.scoring import text_score
from evolkv.tasks import SPLITS, encode_prompt, format_spec, get_task
from evolkv.tasks.code import LENGTHS, RECENT, SLACK, CodeCompletion

BEFORE, AFTER = "Please complete the code given below. \n", "Next line of code:\n"


@pytest.fixture(scope="module")
def drawn(tokenizer):
    """Examples of the standard library, by split."""
    return {split: CodeCompletion(context=700).examples(split, 12, tokenizer) for split in SPLITS}


@pytest.fixture(scope="module")
def all_drawn(drawn):
    return [example for examples in drawn.values() for example in examples]


@pytest.fixture
def folder(tmp_path):
    """Eight files, in each of which only the last line but one names something far away: some 600 tokens up."""
    for number in range(8):
        (tmp_path / f"part{number}").mkdir()
        (tmp_path / f"part{number}" / "module.py").write_text(source(number))
    return tmp_path


def source(number, last="    return combine_totals(first_{0})\n"):
    filler = "".join(f"x = {i}\n" for i in range(300))
    head = f"def combine_totals(first_{number}):\n    pass\n\n\ndef run():\n"
    body = "".join(f"    print({i}, {i + number})\n" for i in range(50))
    return filler + head + body + last.format(number) + "    # the end\n"


def code_of(example):
    assert example.prompt.startswith(BEFORE)
    assert example.prompt.endswith("\n" + AFTER)
    return example.prompt.removeprefix(BEFORE).removesuffix(AFTER)


def lines_of(example):
    text = Path(sysconfig.get_path("stdlib"), example.extra["file"]).read_text(encoding="utf-8")
    return text.split("\n")


@pytest.mark.parametrize("context", [90, 400, 1600])
def test_prompt_has_the_asked_length_and_never_more(context, tokenizer):
    for example in CodeCompletion(context=context).examples("train", 5, tokenizer):
        assert context - SLACK <= encode_prompt(tokenizer, example).shape[1] <= context


def test_target_is_the_line_that_follows_the_code_of_the_prompt(all_drawn):
    for example in all_drawn:
        number = example.extra["line"]
        shown = code_of(example).split("\n")[:-1]
        lines = lines_of(example)
        assert shown == lines[number - 1 - len(shown) : number - 1]
        assert example.references == (lines[number - 1].rstrip(),)
        assert example.target == example.references[0]
        assert example.id == f"code-{example.extra['file']}:{number}"
        assert (example.metric, example.max_new_tokens) == ("code_sim", 64)


def test_right_line_scores_full_marks(all_drawn):
    assert all(text_score("code_sim", e.target + "\n\nmore()", e) == 1 for e in all_drawn)


def test_asked_line_is_code_of_some_length(all_drawn):
    for example in all_drawn:
        line, number = example.target.strip(), example.extra["line"]
        assert len(line) in LENGTHS
        assert not any(mark in line for mark in ("#", "//", "`"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse("\n".join(lines_of(example)))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for node in ast.walk(tree):
            if isinstance(node, documented) and ast.get_docstring(node) is not None:
                assert not node.body[0].lineno <= number <= node.body[0].end_lineno


def test_asked_line_has_a_name_that_stands_further_up_alone(all_drawn):
    for example in all_drawn:
        shown = code_of(example).split("\n")[:-1]
        near = min(RECENT, len(shown) // 2)
        far, recent = ("\n".join(part) for part in (shown[:-near], shown[-near:]))
        words = set(re.findall(r"[^\W\d]\w*", example.target))
        assert any(re.search(rf"\b{word}\b", far) and not re.search(rf"\b{word}\b", recent) for word in words), (
            example.id
        )


def test_files_of_different_splits_never_overlap(drawn, tokenizer):
    files = {split: {example.extra["file"] for example in drawn[split]} for split in SPLITS}
    for split in SPLITS:
        again = CodeCompletion(context=120).examples(split, 12, tokenizer, seed=1)
        files[split] |= {example.extra["file"] for example in again}
    assert all(len(files[split]) > 15 for split in SPLITS)
    assert len(set.union(*files.values())) == sum(len(names) for names in files.values())


def test_tests_and_installed_packages_are_no_sources(all_drawn):
    parts = {part for e in all_drawn for part in Path(e.extra["file"]).parts}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "encodings"}


def test_fewer_examples_are_the_first_of_more_and_the_seed_chooses(drawn, tokenizer):
    task = CodeCompletion(context=700)
    assert task.examples("report", 4, tokenizer) == drawn["report"][:4]
    assert task.examples("report", 4, tokenizer, seed=1) != drawn["report"][:4]


def test_version_of_python_is_on_record(all_drawn):
    major, minor, _ = platform.python_version_tuple()
    assert {e.extra["python"] for e in all_drawn} == {f"{major}.{minor}"}


def test_only_a_line_that_needs_what_is_far_away_is_asked_for(folder, tokenizer):
    task = CodeCompletion(context=800, path=str(folder))
    names = {}
    for split in SPLITS:
        examples = task.examples(split, 9, tokenizer)
        names[split] = [example.extra["file"] for example in examples]
        for example in examples:
            assert example.references[0].startswith("    return combine_totals(first_")
            assert "combine_totals" in code_of(example)
    assert [len(names[split]) for split in SPLITS] == [2, 2, 4]
    assert sorted(file for files in names.values() for file in files) == [
        f"part{number}/module.py" for number in range(8)
    ]


def test_name_that_the_prompt_does_not_reach_back_to_is_not_asked_for(folder, tokenizer):
    with pytest.raises(TaskError, match=r"none of the 4 files of split 'report' .* after 300 tokens of code"):
        CodeCompletion(context=300, path=str(folder)).examples("report", 1, tokenizer)


@pytest.mark.parametrize(
    "last",
    [
        "    # combine_totals of the first\n",
        "    combine_totals  # noqa\n",
        '    """combine_totals of the first"""\n',
        '    """\n    combine_totals(first_{0})\n    """\n',
        '    print(f"""\n    {{combine_totals(1)}} of all\n    """)\n',
        "    print('combine_totals')\n",
        "    combine_totals(" + "1, " * 40 + ")\n",
        "    combine_totals(first_{0}\n",
    ],
)
def test_comments_texts_long_lines_and_broken_files_are_not_asked_for(last, folder, tokenizer):
    for number in range(8):
        (folder / f"part{number}" / "module.py").write_text(source(number, last))
    with pytest.raises(TaskError, match="none of the 4 files of split 'report'"):
        CodeCompletion(context=800, path=str(folder)).examples("report", 1, tokenizer)


def test_each_file_gives_a_line_before_any_gives_a_second(folder, tokenizer):
    for number in range(8):
        last = ("    return combine_totals(first_{0})\n" + "\n" * 40) * (1 + number % 3)
        (folder / f"part{number}" / "module.py").write_text(source(number, last))
    examples = CodeCompletion(context=800, path=str(folder)).examples("report", 99, tokenizer)
    files = [example.extra["file"] for example in examples]
    assert len(set(files[:4])) == len(set(files)) == 4
    assert len({example.id for example in examples}) == len(files) == sum(1 + int(file[4]) % 3 for file in set(files))


def test_unusable_files_are_passed_over(folder, tokenizer):
    whole = {s: CodeCompletion(context=800, path=str(folder)).examples(s, 9, tokenizer) for s in SPLITS}
    (folder / "bytes.py").write_bytes(b"x = '\xff'\n" * 2000)
    (folder / "null.py").write_bytes(b"x = 1\0\n" * 2000)
    (folder / "coding.py").write_bytes(b"# coding: klingon\n" * 2000)
    (folder / "folder.py").mkdir()
    (folder / "dangling.py").symlink_to("nowhere.py")
    (folder / "deep.py").write_text("x = " + "(" * 5000 + "1" + ")" * 5000)
    (folder / "big.py").write_text("x = 1\n" * 200_000)
    (folder / "notes.txt").write_text(source(0))
    for hidden in ("test", ".venv", "__pycache__"):
        (folder / hidden).mkdir()
        (folder / hidden / "module.py").write_text(source(0))
    found = [e for s in SPLITS for e in CodeCompletion(context=800, path=str(folder)).examples(s, 9, tokenizer)]
    assert {example.id for example in found} == {e.id for examples in whole.values() for e in examples}


def test_file_is_read_in_its_own_encoding_and_with_any_line_ends(tmp_path, tokenizer):
    for number in range(4):
        text = "# coding: latin-1\n" + source(number).replace("combine", "größe")
        (tmp_path / f"{number}.py").write_bytes(text.replace("\n", "\r\n").encode("latin-1"))
    (example, _) = CodeCompletion(context=800, path=str(tmp_path)).examples("report", 2, tokenizer)
    assert example.target.startswith("    return größe_totals(first_")
    assert "\r" not in example.prompt


def test_folder_without_sources_is_refused(tmp_path, tokenizer):
    def draw(path, split="report"):
        with pytest.raises(TaskError) as error:
            CodeCompletion(context=200, path=str(path)).examples(split, 1, tokenizer)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "nowhere does not exist; give path= a folder of .py files" in draw(tmp_path / "nowhere")
    assert f"split 'report' is empty: {tmp_path} has 0 .py files" in draw(tmp_path)
    (tmp_path / "a.py").write_text("x = 1\n")
    assert "a.py is a file" in draw(tmp_path / "a.py")
    assert "none of the 1 files of split 'report'" in draw(tmp_path)
    assert "split 'train' is empty" in draw(tmp_path, "train")


def test_context_without_room_for_code_is_refused(tokenizer):
    with pytest.raises(TaskError, match="context=0 is not a length"):
        CodeCompletion(context=0)
    with pytest.raises(TaskError, match=r"context=15 is too small .* give at least \d+ tokens") as error:
        CodeCompletion(context=15).examples("train", 1, tokenizer)
    enough = int(re.search(r"at least (\d+)", str(error.value))[1])
    assert len(encode_prompt(tokenizer, CodeCompletion(context=enough).examples("train", 1, tokenizer)[0])[0]) <= enough


def test_spec_is_read_and_written():
    task = get_task("code:context=400,path=my code")
    assert task == CodeCompletion(400, "my code")
    assert get_task(format_spec(task)) == task
    assert get_task("code") == CodeCompletion()
