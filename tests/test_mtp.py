"""Multi-token prediction: its indices, its losses against two oracles, and the answers it must not see."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

import dsv3_mini.mtp as mtp
from dsv3_mini.config import ModelConfig
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.mtp import depth_tokens, mtp_losses, mtp_losses_reference, second_token_logits

ODD = dict(vocab_size=53, hidden_size=44, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3)
ODD |= dict(q_lora_rank=18, kv_lora_rank=22, qk_nope_head_dim=14, qk_rope_head_dim=6, v_head_dim=10)
ODD |= dict(intermediate_size=36, moe_intermediate_size=12, n_routed_experts=8, n_group=4, initializer_range=0.15)
YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0}


def odd_model(depth=1, seed=0, **changes):
    """A small model in double precision, with gains and routing biases away from their start."""
    torch.manual_seed(seed)
    model = DeepSeekV3(ModelConfig.preset("nano", **{**ODD, "num_nextn_predict_layers": depth, **changes})).double()
    for name, tensor in (*model.named_buffers(), *model.named_parameters()):
        if tensor.dim() == 1:
            tensor.data.uniform_(*(0.5, 1.5) if "norm" in name else (-0.4, 0.4))
    return model


def windows_of(model, batch=2, length=14, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator)


def losses_of(model, windows, function=mtp_losses):
    h = model.model(windows[:, :-1])
    return function(model.mtp_layers, h, windows, model.model.rope)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def module_logits(model, windows, h=None):
    """What every depth of `mtp_losses` hands to the softmax: (B, T-k, V) for k = 1 .. D."""
    found = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: found.append(output.detach()))
    h = model.model(windows[:, :-1]) if h is None else h
    mtp_losses(model.mtp_layers, h, windows, model.model.rope)
    hook.remove()
    return found


# Which token meets which


@given(length=st.integers(2, 20), depth=st.integers(0, 18), batch=st.integers(1, 3))
def test_depth_k_is_given_token_i_plus_k_and_must_predict_the_next(length, depth, batch):
    windows = torch.arange(length).expand(batch, -1)
    if depth > length - 2:
        with pytest.raises(ValueError, match=f"depth={depth} needs windows of at least {depth + 2} tokens"):
            depth_tokens(windows, depth)
        return
    i = torch.arange(length - 1 - depth).expand(batch, -1)
    known, label = depth_tokens(windows, depth)
    assert torch.equal(known, i + depth) and torch.equal(label, i + depth + 1)


# Losses against a loop, position by position


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": YARN}, {"q_lora_rank": None}], ids=["plain", "yarn", "no q"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_losses_and_all_gradients_equal_the_loop_over_positions(depth, changes):
    model = odd_model(depth, **changes)
    windows = windows_of(model, length=8)
    results = [losses_of(model, windows, function) for function in (mtp_losses, mtp_losses_reference)]
    torch.testing.assert_close(*results, rtol=1e-11, atol=0.0)
    weights = torch.rand(depth, generator=torch.Generator().manual_seed(2)).double()
    ours, wanted = (gradients(model, sum(w * loss for w, loss in zip(weights, r, strict=True))) for r in results)
    assert ours.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    for name in ours:
        torch.testing.assert_close(ours[name], wanted[name], rtol=1e-9, atol=1e-13, msg=name)


@pytest.mark.parametrize("n_tokens", [2, 5, 13])
def test_the_sum_over_t_minus_k_terms_is_divided_by_t(n_tokens):
    model = odd_model(depth=1)
    model.lm_head.weight.data.zero_()  # every prediction is uniform
    loss = losses_of(model, windows_of(model, length=n_tokens + 1))[0]
    assert loss.item() == pytest.approx((n_tokens - 1) / n_tokens * math.log(53), rel=1e-12)


def test_every_depth_drops_one_more_term():
    model = odd_model(depth=3)
    model.lm_head.weight.data.zero_()
    losses = [loss.item() for loss in losses_of(model, windows_of(model, length=10))]
    assert losses == pytest.approx([n / 9 * math.log(53) for n in (8, 7, 6)], rel=1e-12)


def test_losses_are_means_over_the_batch():
    model, windows = odd_model(depth=2), windows_of(odd_model(), batch=3)
    single = [losses_of(model, window[None]) for window in windows]
    for together, alone in zip(losses_of(model, windows), zip(*single, strict=True), strict=True):
        torch.testing.assert_close(together, sum(alone) / 3, rtol=1e-11, atol=0.0)


# What a prediction may know


def positions_that_change(model, windows, changed_from, depth):
    """Positions of a depth's predictions that move when tokens from `changed_from` on are replaced."""
    other = windows.clone()
    other[:, changed_from:] = (other[:, changed_from:] + 1) % model.config.vocab_size
    a, b = (module_logits(model, w)[depth - 1] for w in (windows, other))
    return ((a - b).abs().amax((0, 2)) > 1e-9).nonzero().flatten().tolist()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("i", [0, 4, 10])
def test_the_prediction_at_i_knows_token_i_plus_k_and_nothing_later(depth, i):
    model = odd_model(depth)
    windows = windows_of(model)
    n_positions = windows.shape[1] - 1 - depth
    assert positions_that_change(model, windows, i + depth + 1, depth) == list(range(i + 1, n_positions))
    assert positions_that_change(model, windows, i + depth, depth) == list(range(i, n_positions))


def test_a_module_that_is_fed_its_target_is_caught(monkeypatch):
    model, honest = odd_model(), depth_tokens
    monkeypatch.setattr(mtp, "depth_tokens", lambda windows, k: (honest(windows, k)[1],) * 2)
    assert positions_that_change(model, windows_of(model), 6, depth=1)[0] == 4  # token 6 is the label of position 4


def test_a_module_without_its_token_is_caught(monkeypatch):
    model, honest = odd_model(), depth_tokens
    monkeypatch.setattr(mtp, "depth_tokens", lambda windows, k: (windows[:, :-2], honest(windows, k)[1]))
    assert positions_that_change(model, windows_of(model), 6, depth=1)[0] == 6  # an honest one changes at 5


# Whose weights they are


def test_embedding_and_head_are_the_main_models_own_and_norms_are_not():
    model = odd_model(depth=2)
    for layer in model.mtp_layers:
        assert layer.embed_tokens.weight is model.model.embed_tokens.weight
        assert layer.shared_head.head.weight is model.lm_head.weight
    norms = [m for m in model.modules() if type(m).__name__ == "RMSNorm"]
    own = [n for layer in model.mtp_layers for n in (layer.enorm, layer.hnorm, layer.shared_head.norm)]
    assert len({id(n) for n in (*own, model.model.norm)}) == 7 and len({id(n.weight) for n in norms}) == len(norms)


@pytest.mark.parametrize("part", ["embedding", "head"])
def test_shared_tensors_receive_the_gradients_of_both_losses(part):
    model = odd_model()
    windows, tensor = windows_of(model), {"embedding": model.model.embed_tokens, "head": model.lm_head}[part].weight
    main = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
    extra = losses_of(model, windows)[0]
    found = [torch.autograd.grad(x, tensor, retain_graph=True)[0] for x in (main, extra, main + 0.3 * extra)]
    assert found[0].norm() > 0 and found[1].norm() > 0
    torch.testing.assert_close(found[2], found[0] + 0.3 * found[1], rtol=1e-10, atol=1e-13)


def test_the_loss_of_a_module_trains_the_layers_of_the_main_model():
    model = odd_model()
    found = gradients(model, losses_of(model, windows_of(model))[0])
    assert all(found[f"model.layers.{i}.self_attn.o_proj.weight"].norm() > 0 for i in (0, 1, 2))


# The order of the halves, and transformers' own module


@pytest.mark.parametrize("half, deaf_to", [(0, "tokens"), (1, "states")])
def test_the_first_half_of_eh_proj_takes_the_embedding(half, deaf_to):
    model = odd_model()
    model.mtp_layers[0].eh_proj.weight.data.chunk(2, dim=1)[half].zero_()
    windows, h = windows_of(model), torch.randn(2, 13, 44, generator=torch.Generator().manual_seed(3)).double()
    before = module_logits(model, windows, h)[0]
    other_tokens, other_states = module_logits(model, (windows + 1) % 53, h)[0], module_logits(model, windows, -h)[0]
    same, changed = (other_tokens, other_states) if deaf_to == "tokens" else (other_states, other_tokens)
    assert torch.equal(before, same) and (before - changed).abs().max() > 1e-3


def our_name(name):
    """transformers' name of a parameter of its MtpLayer, as the checkpoint has it."""
    return name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")


def transformers_module(model):
    """transformers' MtpModel on its own main model, both with our weights."""
    main = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(model.config.to_dict())).to(model.lm_head.weight.dtype)
    skipped = tuple(f"model.layers.{model.config.num_hidden_layers + k}." for k in range(len(model.mtp_layers)))
    main.load_state_dict({n: x for n, x in model.state_dict().items() if not n.startswith(skipped)}, strict=True)
    twin = MtpModel(main, len(model.mtp_layers)).to(model.lm_head.weight.dtype).eval()
    for theirs, ours in zip(twin.layers, model.mtp_layers, strict=True):
        own = ours.state_dict()
        theirs.load_state_dict({name: own[our_name(name)] for name in theirs.state_dict()}, strict=True)
    return twin


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": YARN}, {"q_lora_rank": None, "n_shared_experts": 2}])
def test_logits_and_gradients_equal_transformers_mtp_model(changes):
    model = odd_model(**changes).float()
    twin, layer, windows = transformers_module(model), model.mtp_layers[0], windows_of(model)
    h, (known, label) = model.model(windows[:, :-1]).detach(), depth_tokens(windows, 1)
    ours = layer.shared_head(layer(h[:, :-1], known, model.model.rope(0, 12)))
    positions = torch.arange(1, 13)[None]  # transformers counts from the given token, one to the right of ours
    theirs = twin.shared_head(twin.forward_layer(0, h[:, :-1], positions, None, input_ids=known))
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()
    for logits in (ours, theirs):
        F.cross_entropy(logits.flatten(0, 1), label.flatten()).backward()
    wanted = {our_name(name): p.grad for name, p in twin.layers[0].named_parameters()}
    wanted |= {
        "embed_tokens.weight": twin.embed_tokens.weight.grad,
        "shared_head.head.weight": twin.shared_head.weight.grad,
    }
    assert wanted.keys() == dict(layer.named_parameters()).keys()
    for name, p in layer.named_parameters():
        assert (p.grad - wanted[name]).abs().max() <= 2e-5 * wanted[name].abs().max(), name


def test_the_second_module_goes_on_from_the_normed_state_as_in_transformers():
    model = odd_model(depth=2).float()
    twin, windows = transformers_module(model), windows_of(model)
    state = model.model(windows[:, :-1]).detach()
    for k, ours in enumerate(module_logits(model, windows), start=1):
        positions = torch.arange(k, 13)[None]
        state = twin.forward_layer(k - 1, state[:, :-1], positions, None, input_ids=depth_tokens(windows, k)[0])
        theirs = twin.shared_head(state)
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max(), k


# Positions and caches


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": YARN}], ids=["plain", "yarn"])
@pytest.mark.parametrize("shift", [1, 2, 37])
def test_counting_positions_from_the_given_token_changes_nothing(shift, changes):
    model = odd_model(**changes)
    windows = windows_of(model)
    h, known = model.model(windows[:, :-1])[:, :-1], depth_tokens(windows, 1)[0]
    layer, rope = model.mtp_layers[0], model.model.rope
    torch.testing.assert_close(layer(h, known, rope(0, 12)), layer(h, known, rope(shift, 12)), rtol=1e-5, atol=1e-5)


def test_positions_do_matter_between_tokens():
    model = odd_model()
    windows = windows_of(model)
    h, known = model.model(windows[:, :-1])[:, :-1], depth_tokens(windows, 1)[0]
    still = tuple(table[:1].expand(12, -1) for table in model.model.rope(0, 1))
    layer = model.mtp_layers[0]
    assert (layer(h, known, still) - layer(h, known, model.model.rope(0, 12))).abs().max() > 1e-2


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 6), min_size=1, max_size=5), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_cached_drafting_equals_one_pass_at_any_cuts(cuts, batch, seed):
    model, length = odd_model(seed=seed), sum(cuts)
    windows = windows_of(model, batch, length + 2, seed)
    h, known = model.model(windows[:, :-1])[:, :-1], depth_tokens(windows, 1)[0]
    layer, rope = model.mtp_layers[0], model.model.rope
    cache = layer.self_attn.new_cache(batch, length)
    cut = zip(h.split(cuts, 1), known.split(cuts, 1), strict=True)
    pieces = [layer(states, ids, rope(cache.length, ids.shape[1]), cache) for states, ids in cut]
    torch.testing.assert_close(torch.cat(pieces, 1), layer(h, known, rope(0, length)), rtol=1e-7, atol=1e-7)


# Drafts


def test_draft_and_judgement_of_one_position_know_the_same_tokens():
    model = odd_model()
    windows = windows_of(model)
    draft, judge = second_token_logits(model.mtp_layers[0], model.model(windows[:, :-1]), windows, model.model.rope)
    torch.testing.assert_close(judge, model(windows[:, :-1])[:, 1:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(draft, module_logits(model, windows)[0], rtol=1e-12, atol=1e-12)


# Bad input


def test_states_without_a_token_each_are_refused():
    model = odd_model()
    with pytest.raises(ValueError, match=r"states of \(B, T\) = \(2, 5\) need as many tokens, not \(2, 6\)"):
        model.mtp_layers[0](torch.zeros(2, 5, 44).double(), torch.zeros(2, 6, dtype=torch.long), model.model.rope(0, 5))


def test_windows_that_do_not_fit_the_states_are_refused():
    model = odd_model()
    with pytest.raises(ValueError, match="13 states need windows of 14 tokens, not 13"):
        mtp_losses(model.mtp_layers, torch.zeros(2, 13, 44).double(), windows_of(model, length=13), model.model.rope)


def test_a_window_too_short_for_the_last_depth_is_refused():
    model = odd_model(depth=2)
    with pytest.raises(ValueError, match="depth=2 needs windows of at least 4 tokens, not 3"):
        losses_of(model, windows_of(model, length=3))


def test_a_negative_depth_is_refused():
    with pytest.raises(ValueError, match="depth=-1"):
        depth_tokens(torch.zeros(1, 5, dtype=torch.long), -1)


def test_no_modules_have_no_losses():
    model = odd_model(depth=0)
    assert losses_of(model, windows_of(model)) == []
