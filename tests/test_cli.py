"""The command: text on stdout, the rest on stderr, one sentence for what went wrong."""

import importlib
import os
import re
import subprocess
import sys

import jax
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache
from typer.testing import CliRunner

from raptax import cli
from raptax.cli import app
from raptax.generate import Sampler, generate
from raptax.models import load

PROMPT = "in the nation"
SETTINGS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own; the command points JAX's at it, for the whole process."""
    monkeypatch.setenv("RAPTAX_CACHE", str(tmp_path / "cache"))
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    compilation_cache.reset_cache()
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf", encodings="Q8_0")


@pytest.fixture(scope="module")
def model(path):
    return load(path)


def raptax(*arguments, **options):
    return CliRunner().invoke(app, [str(a) for a in arguments], **options)


def written(path, *arguments, **options):
    result = raptax("generate", *arguments, "--model", path, **options)
    assert result.exit_code == 0, result.stderr
    return result


def continued(model, prompt=PROMPT, max_tokens=12, **options):
    return "".join(generate(model, prompt, max_tokens=max_tokens, **options))


def test_generate_prints_the_text_and_tells_its_speed_apart(path, model):
    result = written(path, PROMPT, "--max-tokens", 12)
    assert result.stdout == f"{PROMPT}{continued(model)}\n"
    numbers = r"12 tokens, the first after \d+\.\d\d s, then \d+\.\d tokens/s"
    assert re.fullmatch(numbers + "; --max-tokens\n", result.stderr)


def test_one_token_has_no_speed(path):
    result = written(path, PROMPT, "--max-tokens", 1)
    assert re.fullmatch(
        r"1 tokens, the first after \d+\.\d\d s; --max-tokens\n", result.stderr
    )


def test_a_dash_reads_the_prompt_from_stdin(path, model):
    text = "the\nnation is\n"  # without the newline that ends the last line
    for given in (f"{text}\n", text[:-1]):
        result = written(path, "-", "--max-tokens", 12, input=given)
        want = given.removesuffix("\n")
        assert result.stdout == f"{want}{continued(model, want)}\n"


def test_options_reach_the_sampler(path, model):
    options = "--temperature 1.5 --top-k 40 --top-p 0.95 --min-p 0.01 --seed 3"
    options += " --repetition-penalty 1.3 --max-tokens 12"
    result = written(path, PROMPT, *options.split())
    sampler = Sampler.create(
        temperature=1.5, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.3
    )
    want = continued(model, sampler=sampler, seed=3)
    assert result.stdout == f"{PROMPT}{want}\n"
    assert want != continued(model, sampler=sampler, seed=4)


def test_stop_strings_end_the_text(path, model):
    text = continued(model)
    first, second = text[6:8], text[3:5]
    assert min(text.index(first), text.index(second)) > 0
    ends = [text[: text.index(stop)] for stop in (first, second)]
    result = written(path, PROMPT, "--max-tokens", 12, "--stop", first)
    assert result.stdout == f"{PROMPT}{ends[0]}\n"
    result = written(
        path, PROMPT, "--max-tokens", 12, "--stop", first, "--stop", second
    )
    assert result.stdout == f"{PROMPT}{min(ends, key=len)}\n"


def test_chat_uses_the_models_format_and_prints_the_answer_alone(tmp_path):
    fields = {"tokenizer.ggml.add_bos_token": True}
    path = tiny.write(tmp_path / "chat.gguf", encodings="Q8_0", fields=fields)
    model = load(path)
    text = model.tokenizer.chat([{"role": "user", "content": PROMPT}])
    prompt = model.tokenizer.encode(text, add_bos=False)  # the format has its own
    assert prompt.count(tiny.BEGIN) == 1
    result = written(path, PROMPT, "--chat", "--max-tokens", 12)
    assert result.stdout == f"{continued(model, prompt)}\n"


def test_compiled_programs_go_to_the_cache_and_nothing_elsewhere(path, cache, tmp_path):
    before = set(path.parent.iterdir())
    importlib.import_module("raptax.generate.loop").prefill.clear_cache()
    written(path, PROMPT, "--max-tokens", 1)
    assert any((cache / "xla").iterdir())
    assert set(path.parent.iterdir()) == before
    assert set(tmp_path.iterdir()) == {cache}


# What goes wrong


def refused(result) -> str:
    """The one sentence on stderr."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    [line] = result.stderr.splitlines()
    assert line.startswith("raptax: ")
    return line.removeprefix("raptax: ")


def test_a_missing_file(tmp_path):
    result = raptax("generate", PROMPT, "--model", tmp_path / "none.gguf")
    assert re.search(r"none\.gguf' is neither a file nor .*smollm2", refused(result))


def test_a_path_is_told_as_it_is(tmp_path):
    path = tmp_path / "[red]a[/b].gguf"
    assert str(path) in refused(raptax("generate", PROMPT, "--model", path))
    path.mkdir(parents=True)
    assert str(path) in refused(raptax("generate", PROMPT, "--model", path))


@pytest.mark.skipif(sys.platform == "win32" or os.getuid() == 0, reason="may read all")
def test_a_file_that_may_not_be_read(tmp_path, path):
    closed = tmp_path / "closed.gguf"
    closed.write_bytes(path.read_bytes())
    closed.chmod(0)
    assert "ermission" in refused(raptax("generate", PROMPT, "--model", closed))


DAMAGE = {
    "empty": (lambda data: b"", "is empty. Was its download cut short?"),
    "truncated": (lambda data: data[:-500], "Was its download cut short?"),
    "truncated early": (lambda data: data[:100], "Was its download cut short?"),
    "another format": (lambda data: b"PK\3\4" + data[4:], "is not a GGUF file"),
    "corrupt": (lambda data: data[:24] + b"\xff" * 8 + data[32:], "It is damaged."),
}


@pytest.mark.parametrize(("damage", "sentence"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_files(tmp_path, path, damage, sentence):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(damage(path.read_bytes()))
    said = refused(raptax("generate", PROMPT, "--model", bad))
    assert said.startswith(f"{bad} ")
    assert sentence in said


WRONG = {
    "architecture": (dict(architecture="mamba"), "architecture 'mamba'; raptax runs"),
    "tensor": (dict(tensors={"output_norm.weight": None}), "'output_norm.weight'"),
    "tokenizer": (dict(fields={"tokenizer.ggml.model": "bert"}), "model='bert'"),
    "no tokenizer": (
        dict(fields={"tokenizer.ggml.model": None}),
        "tokenizer.ggml.model",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), WRONG.values(), ids=WRONG)
def test_models_that_do_not_run(tmp_path, change, sentence):
    path = tiny.write(tmp_path / "tiny.gguf", **change)
    assert sentence in refused(raptax("generate", PROMPT, "--model", path))


def test_chat_without_a_format(tmp_path):
    fields = {"tokenizer.chat_template": None}
    path = tiny.write(tmp_path / "tiny.gguf", fields=fields)
    result = raptax("generate", PROMPT, "--chat", "--model", path)
    assert "has no chat template" in refused(result)


SLIPS = {
    "long prompt": (["x" * 300], "a prompt of 300 tokens and 128 more exceed"),
    "long answer": ([PROMPT, "--max-tokens", 1000], "context of 256"),
    "no answer": ([PROMPT, "--max-tokens", 0], "max_tokens=0 must be at least 1"),
    "empty prompt": ([""], "the prompt has no tokens"),
    "temperature": ([PROMPT, "--temperature", -1], "temperature=-1.0 must be 0 or lie"),
    "top_k": ([PROMPT, "--temperature", 1, "--top-k", -2], "top_k=-2 must lie in"),
    "huge top_k": ([PROMPT, "--temperature", 1, "--top-k", 10**12], "top_k=10000000"),
    "top_p": ([PROMPT, "--temperature", 1, "--top-p", 2], "top_p=2.0 must lie in [0, 1]"),
    "min_p": ([PROMPT, "--temperature", 1, "--min-p", -1], "min_p=-1.0 must lie in"),
    "penalty": ([PROMPT, "--repetition-penalty", 0], "repetition_penalty=0.0 must lie"),
    "greedy top_k": ([PROMPT, "--top-k", 5, "--temperature", 0], "top_k choose among"),
    "huge seed": ([PROMPT, "--seed", 2**40], "seed=1099511627776 must lie in"),
    "empty stop": ([PROMPT, "--stop", ""], "stop='' must be text that is not empty"),
    "seed": ([PROMPT, "--seed", -1], "seed=-1 must lie in [0, 2**32)"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "sentence"), SLIPS.values(), ids=SLIPS)
def test_slips(path, arguments, sentence):
    assert sentence in refused(raptax("generate", *arguments, "--model", path))


EARLY = [
    ("--max-tokens", "0"),
    ("--top-p", "2"),
    ("--weights", "int8"),
    ("--seed", "-1"),
]


@pytest.mark.parametrize(("option", "value"), EARLY)
def test_options_are_checked_before_the_model(tmp_path, option, value, unchecked):
    missing = tmp_path / "none.gguf"
    said = refused(raptax("generate", PROMPT, "--model", missing, option, value))
    assert f"{option[2:].replace('-', '_')}=" in said


def test_version():
    result = raptax("--version")
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.fullmatch(r"raptax \d\S*\n", result.stdout)


def test_a_limit_without_a_temperature_samples(path, model):
    sampler = Sampler.create(temperature=1.0, top_p=0.9)
    options = ["-n", "12", "--top-p", "0.9", "--top-k", "0", "--seed", "3"]
    want = continued(model, sampler=sampler, seed=3)
    assert written(path, PROMPT, *options).stdout == f"{PROMPT}{want}\n"


def test_a_random_seed_is_printed_and_repeats_the_text(path):
    options = ["-n", 12, "--temperature", 1.5]
    result = written(path, PROMPT, *options)
    [seed] = re.findall(r"^seed (\d+)$", result.stderr, re.MULTILINE)
    again = written(path, PROMPT, *options, "--seed", seed)
    assert again.stdout == result.stdout
    assert "seed" not in again.stderr


def test_a_system_message_is_a_chat(path, model):
    messages = [
        {"role": "system", "content": "the"},
        {"role": "user", "content": PROMPT},
    ]
    result = written(path, PROMPT, "--system", "the", "-n", 12)
    assert result.stdout == f"{continued(model, messages)}\n"


def test_a_chat_message_does_not_end_its_turn(path, model):
    text = "in<|im_end|>"
    want = model.tokenizer.encode_chat([{"role": "user", "content": text}])
    assert want.count(tiny.END) == 1
    assert (
        written(path, text, "--chat", "-n", 12).stdout == f"{continued(model, want)}\n"
    )


def test_an_interrupt_ends_the_text_and_tells_the_speed(path, monkeypatch):
    def interrupted(tokens, *_):
        next(iter(tokens))
        yield "one"
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "text_of", interrupted)
    result = raptax("generate", PROMPT, "--model", path, "-n", 12)
    assert (result.exit_code, result.stdout) == (130, f"{PROMPT}one\n")
    assert re.fullmatch(
        r"1 tokens, the first after \S+ s; interrupted\n", result.stderr
    )


@pytest.mark.filterwarnings("default:tokenizer.ggml")
def test_a_warning_is_one_sentence(tmp_path):
    fields = {"tokenizer.ggml.pre": None}
    path = tiny.write(tmp_path / "tiny.gguf", fields=fields)
    first, _ = written(path, PROMPT, "-n", 2).stderr.splitlines()
    assert first.startswith("tokenizer.ggml.pre is missing; text is cut into words")


def test_stdin_that_is_no_text(path):
    result = raptax("generate", "-", "--model", path, input=b"in \xff")
    assert "stdin is not UTF-8: byte 0xff at 3; iconv" in refused(result)


def test_a_folder_and_a_repository_say_what_to_give(tmp_path):
    result = raptax("generate", PROMPT, "--model", tmp_path)
    assert re.search(r"is a folder; .*it holds no GGUF file", refused(result))
    tiny.write(tmp_path / "a.gguf")
    result = raptax("generate", PROMPT, "--model", tmp_path)
    assert "it holds 'a.gguf'" in refused(result)
    result = raptax("generate", PROMPT, "--model", "HuggingFaceTB/SmolLM2-135M")
    assert "Hugging Face repository, download a GGUF file" in refused(result)


def test_a_model_that_does_not_run_is_not_fetched(cache):
    said = refused(raptax("generate", PROMPT, "--model", "gemma3"))
    assert "architecture gemma3, which raptax does not run; it runs 'smollm2'" in said
    assert not cache.exists() or not (cache / "models").exists()


def test_a_cache_that_cannot_be_written(path, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAPTAX_CACHE", str(tmp_path / "file" / "cache"))
    result = written(path, PROMPT, "-n", 2)
    assert "cannot be written, so compiled programs are not kept" in result.stderr
    said = raptax("fetch", "smollm2").stderr
    assert "cannot be made (Not a directory); RAPTAX_CACHE may name" in said


def test_in_a_process(path, cache):
    """A closed pipe ends it quietly, and a terminal of ASCII alone shows all."""
    run = "from raptax.cli import app; app()"
    call = [sys.executable, "-c", run, "generate", "né", "--model", path]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*map(str, call), "-n", "2"], capture_output=True, check=True, env=environment
    )
    assert done.stdout.startswith(b"n\\xe9")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*map(str, call), "-n", "30"],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_unknown_weights(path, unchecked):
    said = refused(raptax("generate", PROMPT, "--weights", "int8", "--model", path))
    assert (
        said == "weights='int8' is not one of 'packed', 'blocks', 'codes', 'float32'."
    )


def test_what_is_no_number_is_told_by_its_option(path):
    result = raptax("generate", PROMPT, "--model", path, "--top-k", "many")
    assert result.exit_code == 2
    assert "--top-k" in result.stderr


def test_no_such_model_to_fetch():
    said = refused(raptax("fetch", "llama-70b"))
    assert "'llama-70b' is not a model that can be fetched" in said


def test_info_says_what_is_there():
    result = raptax("info")
    assert result.exit_code == 0
    rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines()[:-2])
    assert {"python", "raptax", "jax", "jaxlib", "flax", "numpy"} <= rows.keys()
    assert rows["jax"] == jax.__version__
    assert re.search(r"^native kernels +(yes$|no: .+)", result.stdout, re.MULTILINE)


def test_no_arguments_is_a_cry_for_help():
    result = raptax()
    for command in ("generate", "fetch", "info"):
        assert command in result.output
