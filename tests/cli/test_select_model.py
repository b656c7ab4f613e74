"""`ila select MODEL --layers`: a mask without a search, and `--format`: masks for other tools."""

import json
import shutil

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from transformers import LlamaForCausalLM

from ila.masks.mask import LayerMask
from ila.masks.rules import bare, chosen_by, within_kinds

KINDS = [f"self_attn.{kind}_proj" for kind in "qkvo"]
KINDS += [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]


def names_of(*blocks, kinds=KINDS):
    return {f"model.layers.{block}.{kind}" for block in blocks for kind in kinds}


@pytest.fixture
def select(ila, tiny_model_folder, tmp_path):
    """Return `ila select` on the tiny model, and the names that its mask opens."""

    def run(layers, *options):
        out = tmp_path / "mask.json"
        answer = ila("select", tiny_model_folder, "--layers", layers, "--out", out, *options)
        assert answer.code == 0, answer.err
        return {bare(name) for name in LayerMask.load(out).open}, answer.out

    return run


# ---- rules


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("last:1", names_of(1)),
        ("first:1", names_of(0)),
        ("last:2", names_of(0, 1)),
        ("blocks:1", names_of(1)),
        ("blocks:0-1", names_of(0, 1)),
        ("no-qk", names_of(0, 1, kinds=KINDS[2:])),
        ("last-mlps:1", names_of(1, kinds=KINDS[4:])),
        ("v_proj, mlp.up_proj", names_of(0, 1, kinds=["self_attn.v_proj", "mlp.up_proj"])),
        ("model.layers.1.mlp.up_proj", names_of(1, kinds=["mlp.up_proj"])),
        (r"model\.layers\.1\..*(q|v)_proj", names_of(1, kinds=[KINDS[0], KINDS[2]])),
    ],
)
def test_a_rule_opens_the_layers_that_it_names(layers, expected, select):
    opened, said = select(layers)
    assert opened == expected and f"{len(expected)} of 14 layers open" in said
    lowest = min(int(name.split(".")[2]) for name in expected)
    assert f"backward skips {lowest} of 2" in said


def test_blocks_are_counted_and_not_texts():
    names = [f"model.layers.{block}.mlp.up_proj" for block in range(12)]
    assert chosen_by("last:3", names) == names[9:]
    assert chosen_by("blocks:1, 9-11", names) == [names[1], *names[9:]]
    assert chosen_by("layers.1.mlp.up_proj", names) == [names[1]]
    assert chosen_by("up_proj", ["lm_head", *names]) == names
    experts = [f"layers.{block}.mlp.experts.gate_up_proj" for block in range(3)]
    assert chosen_by("last-mlps:1", ["layers.2.self_attn.q_proj", *experts]) == experts[2:]
    with pytest.raises(ValueError, match=r"in their names; the layers here are attn\.c_proj"):
        chosen_by("last-mlps:1", ["h.0.attn.c_proj"])


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("last:0", "N from 1 to 2"),
        ("last:3", "got '3'"),
        ("last-mlps:3", "layers last-mlps:N must have N from 1 to 2"),
        ("first:x", "got 'x'"),
        ("blocks:1-2", "(0-1), with commas, got '1-2'"),
        ("blocks:", "got ''"),
        ("w_proj", "'w_proj' is no file here, and no name or end of a name"),
        ("q_proj,w_proj", "'w_proj' is no file"),
        (r"layers\.1.*", "matches none of the 14 whole names, such as model.layers.0"),
        ("(", "layers must be last:N"),
        ("no/such.yaml", "is no file here"),
        ("snr", "give exactly one of --top and --freeze"),
    ],
)
def test_a_wrong_rule_is_one_clear_line(layers, expected, ila, tiny_model_folder, tmp_path):
    answer = ila("select", tiny_model_folder, "--layers", layers, "--out", tmp_path / "mask.json")
    assert expected in answer.error() and not list(tmp_path.iterdir())


def test_layers_without_q_and_k_cannot_close_them():
    with pytest.raises(ValueError, match="the layers here are c_attn, c_proj"):
        chosen_by("no-qk", ["h.0.attn.c_attn", "h.0.attn.c_proj"])


# ---- what the path holds


def test_a_path_that_does_not_fit_is_one_clear_line(ila, tiny_model_folder, tmp_path):
    out = tmp_path / "out.json"
    run = tmp_path / "run"
    run.mkdir()
    assert "holds neither" in ila("select", run, "--top", "0.5").error()
    assert "holds neither" in ila("select", run, "--layers", "last:1", "--out", out).error()
    LayerMask({"a": 1.0, "b": 2.0}).save(run)
    for learned in (run, run / "mask.json"):
        line = ila("select", learned, "--layers", "last:1", "--out", out).error()
        assert "--layers is for a model" in line
    line = ila("select", tiny_model_folder, "--out", out).error()
    assert "is a model; say which of its layers" in line and "with --top or --freeze" in line
    line = ila("select", tmp_path / "nowhere", "--layers", "last:1", "--out", out).error()
    assert "nothing is there" in line
    for chosen in (("--layers", "last:1"), ("--top", "0.5")):
        assert "a mask of a model needs --out" in ila("select", tiny_model_folder, *chosen).error()
    assert not out.exists() and {path.name for path in run.iterdir()} == {"mask.json"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--layers", "last:1", "--top", "0.5"), "--top cuts a ranking"),
        (("--layers", "last:1", "--budget", "parameters=1M"), "--budget cuts a learned mask"),
        (("--layers", "last:1", "--max-length", "8"), "--max-length does nothing without"),
        (("--layers", "last:1", "--format", "trl"), "format must be one of ('peft', "),
        (("--layers", "snr", "--top", "0.5", "--freeze", "0.5"), "exactly one of --top"),
        (("--budget", "time=0.5"), "--budget cuts a learned mask"),
        (("--top", "0.5", "--freeze", "0.5"), "exactly one of --top and --freeze"),
    ],
)
def test_options_that_do_not_go_together(options, expected, ila, tiny_model_folder, tmp_path):
    answer = ila("select", tiny_model_folder, *options, "--out", tmp_path / "mask.json")
    assert expected in answer.error() and not list(tmp_path.iterdir())


def test_a_share_of_a_model_is_ranked_by_kappa_unless_another_is_named(
    ila, tiny_model_folder, tmp_path
):
    found = {}
    for name in ((), ("--layers", "kappa"), ("--layers", "snr")):
        out = tmp_path / f"{len(found)}.json"
        answer = ila("select", tiny_model_folder, *name, "--top", "0.3", "--out", out)
        said = f"Ranked by {'snr' if 'snr' in name else 'kappa'}, from the weights alone: "
        (line,) = [text for text in answer.out.splitlines() if text.startswith(said)]
        assert sum(int(part.split()[0]) for part in line.removeprefix(said).split(", ")) == 4
        found[name] = LayerMask.load(out)
    default, named, other = found.values()
    assert default.scores == named.scores != other.scores and len(default.open) == 4
    closed = tmp_path / "closed.json"
    assert ila("select", tiny_model_folder, "--freeze", "0.7", "--out", closed).code == 0
    assert LayerMask.load(closed).gates == default.gates
    # A hub id is a model where only a model can be meant; here no hub is reachable.
    hub = ("select", "nobody/no-such-model", "--top", "0.3")
    assert "no such mask file" in ila(*hub).error()
    assert "no such mask file" not in (line := ila(*hub, "--out", closed).error())
    assert "nobody/no-such-model" in line
    # A mask takes no option of a model.
    line = ila("select", tmp_path / "0.json", "--top", "0.5", "--load-in", "4bit").error()
    assert "--load-in is for a model" in line


def test_the_mask_trains_its_model_and_no_other(select, train, ila, tmp_path, tiny_model_folder):
    select("last:1")
    answer = train(tmp_path / "run", "--mask", tmp_path / "mask.json")
    assert answer.code == 0 and "7 of 14" in answer.out, answer.err
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == names_of(1)
    wider = tmp_path / "wider"
    shutil.copytree(tiny_model_folder, wider)
    settings = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps(settings | {"intermediate_size": 32}))
    answer = ila("select", wider, "--layers", "last:1", "--out", tmp_path / "wider.json")
    assert answer.code == 0  # the configuration alone is read, though the weights do not fit it
    line = train(tmp_path / "other", "--mask", tmp_path / "wider.json").error()
    assert "have other names or sizes" in line


@pytest.mark.parametrize("method", ["snr", "snr_overall", "kappa"])
def test_weights_rank_and_a_share_cuts(method, select, learn, tmp_path):
    opened, said = select(method, "--top", "0.5")
    mask = LayerMask.load(tmp_path / "mask.json")
    assert len(opened) == 7 and mask.open == mask.top(0.5).open and "7 of 14" in said
    assert mask.provenance["search"]["config"]["method"] == method
    if method == "snr":
        assert {name.split(".", 3)[3] for name in opened} == set(KINDS)
    assert learn(tmp_path / "run", "--method", method).code == 0
    assert dict(LayerMask.load(tmp_path / "run").scores) == dict(mask.scores)


def test_a_packed_base_has_other_singular_values(select, tmp_path):
    pytest.importorskip("bitsandbytes")
    scores = []
    for options in ((), ("--load-in", "4bit")):
        select("snr_overall", "--freeze", "0.5", *options)
        scores.append(LayerMask.load(tmp_path / "mask.json").scores)
    assert set(scores[0]) == set(scores[1]) and scores[0] != scores[1]


# ---- files of Spectrum


def test_unfrozen_parameters_open_layers_by_the_rule_of_axolotl(select, tmp_path):
    file = tmp_path / "unfrozen.yaml"
    file.write_text(
        "base_model: some/model\nunfrozen_parameters:\n- ^lm_head.weight$\n"
        "- ^model.embed_tokens.weight$[:100]\n# mlp.up_proj layers\n- model.layers.1.mlp.up_proj\n"
        "- model.layers.[0-9]+.self_attn.v\n- odel.layers.0\n- model.layers.7.mlp.up_proj\n"
    )
    opened, said = select(file)
    expected = names_of(1, kinds=["mlp.up_proj"]) | names_of(0, 1, kinds=["self_attn.v_proj"])
    assert opened == expected
    assert "4 patterns in" in said and "odel.layers.0, model.layers.7.mlp.up_proj" in said


def ratios():
    """Ratios of the tiny model but for o_proj of block 0, with a norm, the head and no number."""
    entries = {"lm_head": {"snr": 8.2, "type": "lm_head"}}
    entries["model.layers.0.input_layernorm"] = {"snr": float("inf"), "type": "input_layernorm"}
    for at, name in enumerate(sorted(names_of(0, 1))):
        entries[name] = {"snr": float(at % 5), "type": name.split(".", 3)[3]}
    del entries["model.layers.0.self_attn.o_proj"]
    entries["model.layers.1.self_attn.o_proj"]["snr"] = float("nan")
    return entries


@pytest.mark.parametrize("layout", ["by layer", "sorted"])
def test_ratios_are_cut_within_their_types(layout, select, tmp_path):
    entries = ratios()
    file = tmp_path / "snr_results_tiny.json"
    if layout == "sorted":
        by_type = {}
        for name, entry in entries.items():
            by_type.setdefault(entry["type"], {})[name] = entry["snr"]
        file.write_text(json.dumps(by_type))
    else:
        file.write_text(json.dumps(entries))
    opened, said = select(file, "--top", "0.5")
    expected = set()
    for kind in set(KINDS) - {"self_attn.o_proj"}:
        alike = names_of(0, 1, kinds=[kind])
        expected.add(max(sorted(alike), key=lambda name: entries[name]["snr"]))
    assert opened == expected and len(expected) == 6
    assert "2 layers have no ratio in" in said and "2 names in" in said and "lm_head" in said


FILES = {
    "a.yaml": ("lora_r: 8\n", "must hold unfrozen_parameters"),
    "b.yaml": ("unfrozen_parameters: all\n", "a list of patterns, got 'all'"),
    "c.yaml": ("unfrozen_parameters: [model.layers.9.mlp]\n", "nothing in it is one of the 14"),
    "d.yaml": ("unfrozen_parameters: ['(']\n", "is no regular expression"),
    "e.yaml": ("unfrozen_parameters: ['model.layers.1[:8]']\n", "names rows of model.layers.1"),
    "f.json": ("[]", "a number as snr and a type for each layer"),
    "g.json": ('{"model.layers.0.mlp.up_proj": {"snr": "1", "type": "a"}}', "got 'model.layers.0"),
    "h.json": ('{"format": "ila.layer_mask", "modules": {}}', "as Spectrum's snr_results"),
    "i.json": ('{"h.0.c": {"snr": 1.0, "type": "c"}}', "nothing in it is one of the 14"),
    "j.json": ("{", "layers"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file_is_one_clear_line(name, ila, tiny_model_folder, tmp_path):
    file = tmp_path / name
    file.write_text(FILES[name][0])
    share = ("--top", "0.5") if name.endswith("json") else ()
    out = tmp_path / "mask.json"
    answer = ila("select", tiny_model_folder, "--layers", file, "--out", out, *share)
    assert FILES[name][1] in answer.error() and not out.exists()


def test_places_within_kinds_keep_the_order_of_equals():
    assert within_kinds({"0.a": 1.0, "1.a": 1.0, "2.a": 2.0, "b": 0.0}) == {
        "0.a": pytest.approx(2 / 3),
        "1.a": pytest.approx(1 / 3),
        "2.a": 1.0,
        "b": 1.0,
    }


# ---- other tools


def targets_of(file, name):
    """Read the targets as the tool does, and return those that it gives to PEFT."""
    if name == "peft":
        return json.loads(file.read_text())["target_modules"]
    content = yaml.safe_load(file.read_text())
    if name == "axolotl":
        assert content["lora_target_linear"] is False
        return content["lora_target_modules"]
    return [part.strip() for part in content["lora_target"].split(",")]


@pytest.mark.parametrize("name", ["peft", "axolotl", "llamafactory"])
def test_a_format_names_the_open_layers_to_peft(name, select, tmp_path, tiny_model_folder):
    opened, said = select("kappa", "--top", "0.5", "--format", name)
    (file,) = [path for path in tmp_path.iterdir() if f".{name}." in path.name]
    assert str(file) in said
    config = LoraConfig(r=2, target_modules=targets_of(file, name))
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_model_folder), config)
    adapted = {bare(n) for n, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert adapted == opened and len(opened) == 7


def test_a_mask_that_is_cut_is_written_for_another_tool(ila, tmp_path):
    mask = LayerMask({f"base_model.model.h.{i}.q": float(i) for i in range(4)})
    mask.save(tmp_path)
    answer = ila("select", tmp_path, "--top", "0.5", "--format", "llamafactory")
    assert answer.code == 0, answer.err
    text = (tmp_path / "mask-top-0.5.llamafactory.yaml").read_text()
    assert text == "lora_target: h.2.q,h.3.q\n"
    cut = tmp_path / "mask-top-0.5.json"
    before = cut.read_bytes()
    assert ila("select", cut, "--format", "peft").code == 0 and cut.read_bytes() == before
    fragment = json.loads((tmp_path / "mask-top-0.5.peft.json").read_text())
    assert fragment == {"target_modules": ["h.2.q", "h.3.q"]}
