"""Folders that we write, that others write, and that are damaged."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

import dsv3_mini.checkpoint as checkpoint
from dsv3_mini.checkpoint import INDEX, Reader, find_folder, load_weights, published_state, save_weights
from dsv3_mini.config import ModelConfig
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.mtp import second_token_logits

FP8 = ModelConfig.preset("v3").quantization_config

SMALL = {"initializer_range": 0.05, "num_hidden_layers": 3, "vocab_size": 256, "q_lora_rank": 40}


def nano(seed=0, **changes):
    torch.manual_seed(seed)
    model = DeepSeekV3(ModelConfig.preset("nano", **{**SMALL, **changes}))
    for _, bias in model.named_buffers():
        bias.uniform_(-0.3, 0.3)
    return model


def files_in(folder):
    return sorted(file.name for file in folder.iterdir())


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def edit_weights(folder, change):
    """Rewrite the single file of a folder after change(tensors)."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_index(folder, changes):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


def quantise(w, block=128):
    """One block after the other, straight from the definition: float8 values and a float32 scale a block."""
    rows, columns = (-(-n // block) for n in w.shape)
    q, scale = torch.empty(w.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            here = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scale[i, j] = w[here].abs().max() / 448
            q[here] = (w[here] / scale[i, j]).to(torch.float8_e4m3fn)
    return q, scale


def dequantise(q, scale, block=128):
    w = q.float()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            w[i * block : (i + 1) * block, j * block : (j + 1) * block] *= scale[i, j]
    return w


# Round trips


@pytest.mark.parametrize("max_shard_bytes", [10**9, 300_000])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_what_was_saved_comes_back_exactly(tmp_path, max_shard_bytes, depth):
    model = nano(num_nextn_predict_layers=depth)
    model.save_pretrained(tmp_path / "new/folder", max_shard_bytes=max_shard_bytes)
    back = DeepSeekV3.from_pretrained(tmp_path / "new/folder")
    assert_same_weights(model, back)
    assert back.config == model.config
    assert all(layer.embed_tokens is back.model.embed_tokens for layer in back.mtp_layers)


def test_bfloat16_is_stored_as_bfloat16_with_biases_in_float32(tmp_path):
    model = nano()
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    biases = {name for name in stored if name.endswith("e_score_correction_bias")}
    assert len(biases) == 3
    assert all(stored[name].dtype == (torch.float32 if name in biases else torch.bfloat16) for name in stored)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, x in DeepSeekV3.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(x, model.state_dict()[name].to(x.dtype)), name


def test_dtype_converts_on_loading_but_for_the_biases(tmp_path):
    nano().save_pretrained(tmp_path)
    model = DeepSeekV3.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for _, b in model.named_buffers()} == {torch.float32}


def test_experts_are_stored_one_by_one(tmp_path):
    model = nano()
    model.save_pretrained(tmp_path)
    stored, experts = load_file(tmp_path / "model.safetensors"), model.model.layers[1].mlp.experts
    assert not any("gate_up" in name for name in stored)
    for i in range(16):
        gate, up, down = (stored[f"model.layers.1.mlp.experts.{i}.{n}_proj.weight"] for n in ("gate", "up", "down"))
        assert torch.equal(torch.cat((gate, up)), experts.gate_up_proj[i])
        assert torch.equal(down, experts.down_proj[i])


def test_shards_keep_the_limit_and_the_index_is_exact(tmp_path):
    model = nano()
    model.save_pretrained(tmp_path, max_shard_bytes=300_000)
    index = json.loads((tmp_path / INDEX).read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    held = {name: shard.name for shard in shards for name in load_file(shard)}
    assert held == index["weight_map"] and held.keys() == published_state(model.state_dict()).keys()
    sizes = [[x.nbytes for x in load_file(shard).values()] for shard in shards]
    assert sum(map(sum, sizes)) == index["metadata"]["total_size"]
    assert all(sum(size) <= 300_000 or len(size) == 1 for size in sizes)


def test_overwriting_shards_by_a_single_file_and_back_leaves_no_old_file(tmp_path):
    first, second = nano(0), nano(1)
    first.save_pretrained(tmp_path, max_shard_bytes=300_000)
    sharded = files_in(tmp_path)
    second.save_pretrained(tmp_path)
    assert files_in(tmp_path) == ["config.json", "model.safetensors"]
    assert_same_weights(second, DeepSeekV3.from_pretrained(tmp_path))
    first.save_pretrained(tmp_path, max_shard_bytes=300_000)
    assert files_in(tmp_path) == sharded
    assert_same_weights(first, DeepSeekV3.from_pretrained(tmp_path))


def test_saving_keeps_files_that_are_not_weights(tmp_path):
    for name in ("tokenizer.json", "model_card.md", "model-best.safetensors"):
        (tmp_path / name).write_text("mine")
    nano().save_pretrained(tmp_path)
    DeepSeekV3.from_pretrained(tmp_path)
    assert {"tokenizer.json", "model_card.md", "model-best.safetensors"} < set(files_in(tmp_path))


# Trading with transformers


@pytest.mark.parametrize("max_shard_bytes", [10**9, 500_000])
def test_transformers_opens_what_we_save(tmp_path, max_shard_bytes):
    model, ids = nano(), torch.arange(40).view(2, 20)
    model.save_pretrained(tmp_path, max_shard_bytes=max_shard_bytes)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("size", ["50GB", "500KB"])
def test_we_open_what_transformers_saves_without_the_prediction_module(tmp_path, size):
    model, ids = nano(), torch.arange(40).view(2, 20)
    model.save_pretrained(tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    back = DeepSeekV3.from_pretrained(tmp_path / "theirs")
    assert not back.mtp_layers and back.config.num_nextn_predict_layers == 0
    torch.testing.assert_close(back(ids), model(ids), rtol=2e-5, atol=2e-5)


def test_a_prediction_module_in_the_folder_may_be_left_aside_by_the_config(tmp_path):
    model = nano()
    model.save_pretrained(tmp_path)
    model.config.replace(num_nextn_predict_layers=0).save_pretrained(tmp_path)
    assert not DeepSeekV3.from_pretrained(tmp_path).mtp_layers


def transformers_report(folder, **options):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    return model, {kind: set(names) for kind, names in info.items() if names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 300_000])
def test_transformers_has_nothing_to_report_on_a_folder_without_prediction_module(tmp_path, dtype, max_shard_bytes):
    model, ids = nano(num_nextn_predict_layers=0).to(dtype), torch.arange(40).view(2, 20)
    model.save_pretrained(tmp_path, max_shard_bytes=max_shard_bytes)
    theirs, report = transformers_report(tmp_path)
    gates = {p.dtype for name, p in theirs.named_parameters() if name.endswith("gate.weight")}
    others = {p.dtype for name, p in theirs.named_parameters() if not name.endswith("gate.weight")}
    assert report == {} and others == {dtype} and gates <= {dtype, torch.float32}  # from 5.24 on it widens the gates
    tolerance = 2e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=tolerance, atol=tolerance)


def test_transformers_leaves_the_prediction_module_aside_and_misses_nothing(tmp_path):
    nano().save_pretrained(tmp_path)
    _, report = transformers_report(tmp_path, dtype=torch.float32)
    assert report.keys() == {"unexpected_keys"}
    assert all(name.startswith("model.layers.3.") for name in report["unexpected_keys"])


def test_transformers_drafts_with_the_prediction_module_that_we_save(tmp_path, monkeypatch):
    model, ids = nano(), torch.arange(40).view(2, 20)
    model.save_pretrained(tmp_path, max_shard_bytes=300_000)
    # transformers knows the module as layer 61 only; told that it is layer 3 here, it has nothing to report
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3.*"])
    main, report = transformers_report(tmp_path, dtype=torch.float32)
    twin, positions = MtpModel.from_pretrained(main), torch.arange(1, 20)[None]
    state = twin.forward_layer(0, model.model(ids)[:, :-1], positions, None, input_ids=ids[:, 1:])
    draft, _ = second_token_logits(
        model.mtp_layers[0], model.model(ids), torch.cat((ids, ids[:, :1]), 1), model.model.rope
    )
    assert report == {}
    torch.testing.assert_close(twin.shared_head(state), draft, rtol=2e-5, atol=2e-5)


# FP8


@pytest.mark.parametrize("shape", [(576, 192), (128, 128), (1, 130), (257, 5)])
def test_float8_is_multiplied_by_its_scale_at_any_shape(tmp_path, shape):
    q, scale = quantise(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    save_file({"w": q, "w_scale_inv": scale}, tmp_path / "model.safetensors")
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    assert torch.equal(Reader(tmp_path).read("w", torch.float32), dequantise(q, scale))
    assert torch.equal(Reader(tmp_path).read("w"), dequantise(q, scale).bfloat16())


def write_float8_folder(model, folder):
    """A miniature of the published release; returns {name: float32 values} that it stands for."""
    stored, values = {}, {}
    for name, x in published_state(model.state_dict()).items():
        if name.endswith(("_proj.weight", "_with_mqa.weight")) and "eh_proj" not in name:
            stored[name], stored[f"{name}_scale_inv"] = q, scale = quantise(x)
            values[name] = dequantise(q, scale)
        else:
            stored[name] = x.clone() if name.endswith("bias") else x.bfloat16()
            values[name] = stored[name].float()
    folder.mkdir(exist_ok=True)
    save_file(stored, folder / "model.safetensors")
    model.config.replace(quantization_config=FP8, torch_dtype="bfloat16").save_pretrained(folder)
    return values


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_float8_checkpoint_opens_dequantised_and_runs(tmp_path, dtype):
    values = write_float8_folder(nano(hidden_size=136, num_hidden_layers=2), tmp_path)
    model = DeepSeekV3.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype or torch.bfloat16}
    for name, x in published_state(model.state_dict()).items():
        assert torch.equal(x, values[name].to(x.dtype)), name
    assert model(torch.arange(20).view(2, 10)).isfinite().all()


def test_a_float8_checkpoint_saved_again_is_plain(tmp_path):
    write_float8_folder(nano(num_hidden_layers=2), tmp_path / "fp8")
    DeepSeekV3.from_pretrained(tmp_path / "fp8").save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    assert not any(name.endswith("_scale_inv") for name in load_file(tmp_path / "plain/model.safetensors"))


@pytest.mark.parametrize("fault", ["missing", "misshapen"])
def test_float8_without_its_right_scales_is_refused_by_name(tmp_path, fault):
    write_float8_folder(nano(num_hidden_layers=2), tmp_path)
    key = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    edit_weights(tmp_path, lambda t: t.pop(key) if fault == "missing" else t.update({key: t[key].new_ones(2, 3)}))
    with pytest.raises(ValueError, match="layers.0.self_attn.o_proj.weight_scale_inv"):
        DeepSeekV3.from_pretrained(tmp_path)


def test_scales_beside_a_weight_that_is_not_float8_are_refused(tmp_path):
    write_float8_folder(nano(num_hidden_layers=2), tmp_path)
    key = "model.layers.0.self_attn.o_proj.weight"
    edit_weights(tmp_path, lambda tensors: tensors.update({key: tensors[key].bfloat16()}))
    with pytest.raises(ValueError, match=f"{key} is torch.bfloat16, and the checkpoint has scales {key}_scale_inv"):
        DeepSeekV3.from_pretrained(tmp_path)


def test_scales_of_a_weight_that_is_not_there_are_refused(tmp_path):
    nano().save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.update({"stray.weight_scale_inv": torch.ones(1, 1)}))
    with pytest.raises(ValueError, match="has unexpected 1 tensors: stray.weight_scale_inv"):
        DeepSeekV3.from_pretrained(tmp_path)


@pytest.mark.parametrize("with_scale", [True, False])
def test_the_other_float8_format_is_refused(tmp_path, with_scale):
    write_float8_folder(nano(num_hidden_layers=2), tmp_path)
    key = "model.layers.0.self_attn.o_proj.weight"

    def change(tensors):
        tensors[key] = tensors[key].float().to(torch.float8_e5m2)
        if not with_scale:
            tensors.pop(f"{key}_scale_inv")

    edit_weights(tmp_path, change)
    with pytest.raises(ValueError, match=f"{key} is torch.float8_e5m2, and the checkpoint"):
        DeepSeekV3.from_pretrained(tmp_path)


# Damage


def spoil(folder, fault):
    """One fault of a sharded folder."""
    shards, index = sorted(folder.glob("*.safetensors")), folder / INDEX
    if fault == "torn shard":
        shards[1].write_bytes(shards[1].read_bytes()[:-100])
    elif fault == "empty shard":
        shards[1].write_bytes(b"")
    elif fault == "missing shard":
        shards[1].unlink()
    elif fault == "torn index":
        index.write_text(index.read_text()[:200])
    elif fault == "index without a map":
        index.write_text("[]")
    elif fault == "index that promises too much":
        listing = json.loads(index.read_text())
        name = next(n for n, file in listing["weight_map"].items() if file == shards[0].name)
        listing["weight_map"][name] = shards[1].name
        index.write_text(json.dumps(listing))


@pytest.mark.parametrize(
    "fault, error, named",
    [
        ("torn shard", ValueError, "model-00002-of"),
        ("empty shard", ValueError, "model-00002-of"),
        ("missing shard", FileNotFoundError, "lacks model-00002-of"),
        ("torn index", ValueError, "not a checkpoint index"),
        ("index without a map", ValueError, "not a checkpoint index"),
        ("index that promises too much", ValueError, "lacks .*which its index promises"),
    ],
)
def test_damaged_shards_are_named(tmp_path, fault, error, named):
    nano().save_pretrained(tmp_path, max_shard_bytes=500_000)
    spoil(tmp_path, fault)
    with pytest.raises(error, match=named):
        DeepSeekV3.from_pretrained(tmp_path)


def test_a_torn_single_file_is_named(tmp_path):
    nano().save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model.safetensors is not a whole"):
        DeepSeekV3.from_pretrained(tmp_path)


NORM, EXPERT = "model.layers.2.input_layernorm.weight", "model.layers.1.mlp.experts.3.up_proj.weight"
FAULTS = {
    "a missing tensor": (lambda t: t.pop(NORM), f"lacks 1 tensors: {NORM}"),
    "a missing expert": (lambda t: t.pop(EXPERT), f"lacks 1 tensors: {EXPERT}"),
    "an extra tensor": (lambda t: t.update(stray=torch.ones(2)), "has unexpected 1 tensors: stray"),
    "a misshapen norm": (lambda t: t.update({NORM: torch.ones(127)}), f"{NORM} has shape .127,., the config asks"),
    "a misshapen expert": (lambda t: t.update({EXPERT: torch.ones(128, 64)}), f"{EXPERT} has shape .128, 64."),
    "a prediction module torn in two": (lambda t: t.pop("model.layers.3.eh_proj.weight"), "lacks 1 .*eh_proj"),
    "another embedding": (lambda t: t["model.layers.3.embed_tokens.weight"].add_(1), "embed_tokens.weight differs"),
    "another head": (lambda t: t["model.layers.3.shared_head.head.weight"].add_(1), "differs from"),
}


@pytest.mark.parametrize("change, named", FAULTS.values(), ids=FAULTS.keys())
def test_wrong_tensors_are_named(tmp_path, change, named):
    nano().save_pretrained(tmp_path)
    edit_weights(tmp_path, change)
    with pytest.raises(ValueError, match=named):
        DeepSeekV3.from_pretrained(tmp_path)


def test_a_row_that_would_broadcast_is_still_misshapen(tmp_path):
    nano().save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda t: t.update({EXPERT: torch.ones(1, 128)}))
    with pytest.raises(ValueError, match="has shape"):
        DeepSeekV3.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "prepare, error, named",
    [
        (lambda f: None, FileNotFoundError, "no checkpoint folder"),
        (lambda f: f.mkdir(), FileNotFoundError, "no config.json"),
        (lambda f: ModelConfig.preset("nano").save_pretrained(f), FileNotFoundError, "holds no"),
        (lambda f: f.write_text("a file"), FileNotFoundError, "no checkpoint folder"),
    ],
    ids=["missing folder", "empty folder", "folder without weights", "a file"],
)
def test_folders_that_are_no_checkpoint_are_refused(tmp_path, prepare, error, named):
    prepare(tmp_path / "run")
    with pytest.raises(error, match=named):
        DeepSeekV3.from_pretrained(tmp_path / "run")


def test_the_config_of_another_model_is_refused(tmp_path):
    nano().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type='llama'"):
        DeepSeekV3.from_pretrained(tmp_path)


@pytest.mark.parametrize("error", [OSError("cannot reach the hub"), "bad name"])
def test_a_hub_id_that_cannot_be_fetched_is_one_clear_line(monkeypatch, error):
    def fetch(*args, **kwargs):
        raise error

    if isinstance(error, OSError):
        monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(FileNotFoundError, match="nor a hub id that could be fetched") as raised:
        find_folder("nobody/no-such-model" if isinstance(error, OSError) else "two words/-")
    assert "\n" not in str(raised.value)


def test_a_hub_id_is_downloaded_and_opened(tmp_path, monkeypatch):
    nano().save_pretrained(tmp_path)
    asked = []
    fetch = lambda name, **options: asked.append(name) or str(tmp_path)  # noqa: E731
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert_same_weights(DeepSeekV3.from_pretrained("deepseek-ai/DeepSeek-V3"), nano())
    assert asked == ["deepseek-ai/DeepSeek-V3"]


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/elsewhere.safetensors", "sub/x.safetensors", "", ".."])
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path, file):
    nano().save_pretrained(tmp_path / "run", max_shard_bytes=500_000)
    save_file({NORM: torch.ones(128)}, tmp_path / "elsewhere.safetensors")
    edit_index(tmp_path / "run", {NORM: file})
    with pytest.raises(ValueError, match=f"index.json sends {NORM} to {file!r}, which is not the name of a file"):
        DeepSeekV3.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize("value", [3, None, ["model-00001-of-00002.safetensors"], {}])
def test_an_index_whose_files_are_no_strings_is_refused(tmp_path, value):
    nano().save_pretrained(tmp_path, max_shard_bytes=500_000)
    edit_index(tmp_path, {NORM: value})
    with pytest.raises(ValueError, match=f"index.json sends {NORM} to"):
        DeepSeekV3.from_pretrained(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], "x", 7])
def test_an_index_whose_map_is_no_map_is_refused(tmp_path, weight_map):
    nano().save_pretrained(tmp_path, max_shard_bytes=500_000)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="index.json is not a checkpoint index"):
        DeepSeekV3.from_pretrained(tmp_path)


def test_a_name_in_two_files_without_an_index_is_refused(tmp_path):
    nano().save_pretrained(tmp_path, max_shard_bytes=500_000)
    (tmp_path / INDEX).unlink()
    assert_same_weights(DeepSeekV3.from_pretrained(tmp_path), nano())  # without doubles, no index is needed
    save_file({NORM: torch.ones(128)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=f"{NORM} is in model-0000.* and in other.safetensors, and .* has no index"):
        DeepSeekV3.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ['{"model_type": "deepseek_v3", "hid', "[]", "", "null", "\udcff"])
def test_a_torn_config_is_named(tmp_path, text):
    nano().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="config.json: ") as raised:
        DeepSeekV3.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["NORM", "EXPERT", "model.layers.3.embed_tokens.weight"])
def test_weights_that_are_no_numbers_are_named(tmp_path, name, bad):
    name = {"NORM": NORM, "EXPERT": EXPERT}.get(name, name)
    nano().save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors[name].view(-1)[7:8].fill_(bad))
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity"):
        DeepSeekV3.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_integer_weights_are_refused(tmp_path, dtype):
    nano().save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.update({NORM: tensors[NORM].to(dtype)}))
    with pytest.raises(ValueError, match=f"{NORM} is stored as {dtype}; a floating type is needed"):
        DeepSeekV3.from_pretrained(tmp_path)


@pytest.mark.parametrize("layers, error", [(2, "has unexpected"), (4, "has unexpected|lacks")])
def test_an_ordinary_layer_is_never_taken_for_a_prediction_module(tmp_path, layers, error):
    model = nano(num_nextn_predict_layers=0)
    model.save_pretrained(tmp_path)
    model.config.replace(num_hidden_layers=layers).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=error):
        DeepSeekV3.from_pretrained(tmp_path)


def test_two_prediction_modules_where_the_config_promises_one_are_refused(tmp_path):
    model = nano(num_nextn_predict_layers=2)
    model.save_pretrained(tmp_path)
    model.config.replace(num_nextn_predict_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has unexpected .*model.layers.4"):
        DeepSeekV3.from_pretrained(tmp_path)


# Types, devices and memory


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int32, torch.float8_e5m2, torch.complex64, 16])
def test_a_dtype_that_weights_cannot_have_is_refused_before_anything_is_touched(tmp_path, dtype):
    nano().save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for act in (lambda: nano().save_pretrained(tmp_path, dtype), lambda: DeepSeekV3.from_pretrained(tmp_path, dtype)):
        with pytest.raises(ValueError, match="must be None or a floating type such as torch.bfloat16"):
            act()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_one_file_is_open_at_a_time_and_each_is_opened_about_once(tmp_path, monkeypatch):
    model, opened, open_tensors = nano(), [], checkpoint.open_tensors
    model.save_pretrained(tmp_path, max_shard_bytes=300_000)
    monkeypatch.setattr(checkpoint, "open_tensors", lambda file: opened.append(file.name) or open_tensors(file))
    assert_same_weights(DeepSeekV3.from_pretrained(tmp_path), model)
    assert len(set(opened)) == len(list(tmp_path.glob("*.safetensors"))) > 5
    assert len(opened) <= len(set(opened)) + 4  # an expert layer may lie on a border, and copies are looked up again


def test_loaded_tensors_are_their_own_and_not_a_view_of_the_file(tmp_path):
    nano().save_pretrained(tmp_path)
    model = DeepSeekV3.from_pretrained(tmp_path)
    before = model.lm_head.weight.detach().clone()
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 4_000_000)
    assert torch.equal(model.lm_head.weight, before)


def test_tensors_are_put_on_the_asked_device_one_by_one(tmp_path):
    nano().save_pretrained(tmp_path)
    loaded = load_weights({"lm_head.weight": torch.empty(256, 128)}, tmp_path, ignore=("model.",), device="meta")
    assert loaded["lm_head.weight"].device.type == "meta"


# Nothing half-written


def test_a_parent_that_is_a_file_is_refused_before_writing(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match="out is a file; a folder is needed"):
        nano().save_pretrained(tmp_path / "out/run")
    assert files_in(tmp_path) == ["out"]


def test_a_config_that_cannot_be_written_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    old, write = nano(0), type(tmp_path).write_text
    old.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full_disk(self, text, **options):
        write(self, text[:20], **options)
        raise OSError("no space left on device")

    monkeypatch.setattr(type(tmp_path), "write_text", full_disk)
    with pytest.raises(OSError, match="no space"):
        nano(1, moe_intermediate_size=48).save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_a_killed_writer_left_is_swept_away_by_the_next(tmp_path):
    for name in ("model.safetensors.partial", "model-00003-of-00009.safetensors.partial"):
        (tmp_path / name).write_text("half")
    nano().save_pretrained(tmp_path)
    assert files_in(tmp_path) == ["config.json", "model.safetensors"]


def test_another_architecture_may_be_saved_over_an_older_one(tmp_path):
    nano(0, num_nextn_predict_layers=2).save_pretrained(tmp_path, max_shard_bytes=300_000)
    other = nano(1, moe_intermediate_size=48, num_hidden_layers=2)
    other.save_pretrained(tmp_path, dtype=torch.bfloat16)
    back = DeepSeekV3.from_pretrained(tmp_path, dtype=torch.float32)
    assert back.config.moe_intermediate_size == 48 and len(back.model.layers) == 3


def test_a_folder_that_is_a_file_is_refused_before_writing(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"):
        nano().save_pretrained(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("old, new", [(10**9, 300_000), (300_000, 10**9), (300_000, 250_000)])
def test_a_save_that_fails_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch, error, old, new):
    model, calls = nano(0), []
    model.save_pretrained(tmp_path, max_shard_bytes=old)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full_disk(tensors, file, **options):
        file.write_bytes(b"half a file")
        calls.append(file)
        if len(calls) == (1 if new == 10**9 else 3):
            raise error("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(error):
        nano(1).save_pretrained(tmp_path, max_shard_bytes=new)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_stop_between_two_renames_never_mixes_checkpoints(tmp_path, monkeypatch):
    old, new = nano(0), nano(1)
    old.save_pretrained(tmp_path)
    replace, left = os.replace, [3]

    def stop(self, target):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        replace(self, target)

    monkeypatch.setattr("pathlib.Path.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        new.save_pretrained(tmp_path, max_shard_bytes=500_000)
    assert_same_weights(old, DeepSeekV3.from_pretrained(tmp_path))


def test_a_shard_limit_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        nano().save_pretrained(tmp_path, max_shard_bytes=0)
    assert files_in(tmp_path) == []


def test_files_say_that_they_are_torch_tensors(tmp_path):
    save_weights({"w": torch.ones(2)}, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_weights_load_into_shapes_without_a_model(tmp_path):
    save_weights({"w": torch.arange(6.0).view(2, 3)}, tmp_path)
    loaded = load_weights({"w": torch.empty(2, 3, device="meta")}, tmp_path)
    assert torch.equal(loaded["w"], torch.arange(6.0).view(2, 3))
