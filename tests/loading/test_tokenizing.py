"""Tokenizers beside a model: read, named by the user, or refused before anything else is done."""

import pytest
import tiny
from transformers import AutoTokenizer

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.loading import tokenizers as module
from optimum_fwdprune.loading.tokenizers import load_tokenizer, tokenizer_files


SENTENCEPIECE, TIKTOKEN = b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02", b"IQ== 0\nIg== 1\n"
FAMILIES = ["llama_gqa_biases", "qwen2", "opt_pre_norm", "bloom"]


@pytest.fixture
def base(tmp_path):
    """A function that saves a dense model of a family with some files of a tokenizer."""

    def base(name="llama_gqa_biases", **files):
        tiny.make_model(name).save_pretrained(tmp_path / "base")
        for file, content in files.items():
            (tmp_path / "base" / file.replace("__", ".")).write_bytes(content)
        return tmp_path / "base"

    return base


@pytest.fixture
def warnings(monkeypatch):
    said = []
    for name in ("loading.tokenizers", "loading.opening"):
        monkeypatch.setattr(f"optimum_fwdprune.{name}.logger.warning", lambda text, *args: said.append(text % args))
    return said


@pytest.fixture
def installed(monkeypatch):
    """A function that says which packages are installed."""

    def installed(*packages):
        for package in ("sentencepiece", "protobuf"):
            monkeypatch.setattr(module, f"is_{package}_available", lambda package=package: package in packages)
        monkeypatch.setattr(
            module.importlib.util, "find_spec", lambda package: package if package in packages else None
        )

    return installed


@pytest.mark.parametrize(
    ("file", "content", "packages", "message"),
    [
        (
            "tokenizer.model",
            SENTENCEPIECE,
            [],
            "sentencepiece and protobuf are not installed.*pip install sentencepiece p",
        ),
        (
            "tokenizer.model",
            SENTENCEPIECE,
            ["sentencepiece"],
            "; protobuf is not installed. Install: pip install protobuf",
        ),
        (
            "spiece.model",
            SENTENCEPIECE,
            ["protobuf"],
            "spiece.model, which is read with sentencepiece and protobuf; sente",
        ),
        (
            "tokenizer.model",
            TIKTOKEN,
            ["sentencepiece"],
            "tokenizer.model, which is read with tiktoken; tiktoken is not",
        ),
        ("tiktoken.model", TIKTOKEN, [], "pip install tiktoken; or name another tokenizer with tokenizer=... "),
    ],
)
def test_a_missing_package_is_named_before_the_model_is_loaded(
    file, content, packages, message, base, installed, monkeypatch
):
    folder = base(**{file.replace(".", "__"): content})
    installed(*packages)
    monkeypatch.setattr(
        "optimum_fwdprune.loading.opening.load_for_task", lambda *_, **__: pytest.fail("The model was loaded.")
    )
    with pytest.raises(ValueError, match=message):
        FwdPruner.from_pretrained(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_files_that_hold_no_vocabulary_are_refused(name, base):
    """Of some families transformers makes a tokenizer of one special token then."""
    with pytest.raises(
        ValueError, match=r"base \(tokenizer_config\.json\) cannot be loaded: .* or name another tokenizer"
    ):
        FwdPruner.from_pretrained(base(name, tokenizer_config__json=b"{}"))


def test_a_damaged_tokenizer_is_refused(base):
    with pytest.raises(ValueError, match=r"The tokenizer of .*base \(tokenizer\.json\) cannot be loaded: "):
        FwdPruner.from_pretrained(base(tokenizer__json=b"{"))


@pytest.mark.parametrize("name", FAMILIES)
def test_without_files_of_a_tokenizer_there_is_none_and_a_warning(name, base, tokens, warnings, tmp_path):
    pruner = FwdPruner.from_pretrained(base(name))

    assert pruner.tokenizer is None
    assert len(warnings) == 1 and "has no tokenizer; calibration can only use token ids" in warnings[0]
    pruner.prune(tiny.request(sparsity=0.1), tokens)
    pruner.save_pretrained(tmp_path / "pruned")
    assert tokenizer_files(tmp_path / "pruned") == {} and len(warnings) == 1


@pytest.mark.parametrize("form", ["name", "path", "object"])
def test_a_named_tokenizer_is_used_and_saved(form, base, tokenizer, tokens, tmp_path, installed):
    folder = base(tokenizer__model=SENTENCEPIECE)
    tokenizer.save_pretrained(tmp_path / "words")
    words = {"name": str(tmp_path / "words"), "path": tmp_path / "words", "object": tokenizer}[form]
    pruner = FwdPruner.from_pretrained(folder, tokenizer=words)
    pruner.prune(tiny.request(sparsity=0.1), tokens)
    pruner.save_pretrained(tmp_path / "pruned")

    assert AutoTokenizer.from_pretrained(tmp_path / "pruned").get_vocab() == tokenizer.get_vocab()


def test_what_is_no_tokenizer_is_refused(base, tmp_path):
    folder = base()
    for words, message in (
        (3, "tokenizer must be a tokenizer of transformers, or its folder or repository; got a int"),
        (folder, "base has no files of a tokenizer"),
        ("some/words", "some/words is neither a local file nor in the cache of the Hub, and HF_HUB_OFFLINE is set"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            FwdPruner.from_pretrained(folder, tokenizer=words)


def test_a_model_in_memory_whose_folder_has_a_tokenizer_is_not_saved_without_it_in_silence(
    base, tokenizer, tokens, warnings, tmp_path
):
    from transformers import AutoModelForCausalLM

    folder = base()
    for has in (False, True):
        if has:
            tokenizer.save_pretrained(folder)
        pruner = FwdPruner(AutoModelForCausalLM.from_pretrained(folder))
        pruner.prune(tiny.request(sparsity=0.1), tokens)
        pruner.save_pretrained(tmp_path / f"pruned-{has}")

        assert [("saved without a tokenizer" in text and str(folder) in text) for text in warnings] == [True] * has


def test_a_tokenizer_is_loaded_as_before(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)

    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_the_pruner_takes_a_tokenizer_or_its_name_and_refuses_anything_else(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    model = tiny.make_model("llama_gqa_biases")

    assert FwdPruner(model, tmp_path).tokenizer.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ValueError, match=r"must be a tokenizer of transformers.*got a dict"):
        FwdPruner(model, {"tokenizer": 1})
