import math
from collections import Counter

import pytest
import torch

from dsv3_mini import data
from dsv3_mini.domains import (
    DOMAIN_SYMBOLS,
    DOMAIN_VOCAB_SIZE,
    DOMAINS,
    arithmetic,
    brackets,
    copy,
    domain_entropy,
    domain_windows,
    draw_domain,
    recall,
)


def draw(maker, *arguments, seed=0, **options):
    return maker(*arguments, torch.Generator().manual_seed(seed), **options)


def texts_of(tokens):
    return ["".join(DOMAIN_SYMBOLS[i] for i in row) for row in tokens.tolist()]


# Perfect predictors, which read the text alone: what the next symbol can be, and with what probability.


def next_in_arithmetic(past):
    digits = {d: 0.1 for d in "0123456789"}
    episode = past[len(past) // 7 * 7 :]
    if len(episode) in (0, 2):
        return digits
    if len(episode) == 1:
        return {"+": 0.5, "*": 0.5}
    a, sign, b = episode[:3]
    return {f"{a}{sign}{b}={int(a) + int(b) if sign == '+' else int(a) * int(b):02};"[len(episode)]: 1.0}


def next_in_recall(past):
    episode = past[len(past) // 18 * 18 :]
    pairs = dict(zip(episode[:8:2], episode[1:8:2], strict=False))
    if len(episode) < 8:
        fresh = [k for k in "abcdefghijklmnop" if k not in episode[::2]] if len(episode) % 2 == 0 else "0123456789"
        return {symbol: 1 / len(fresh) for symbol in fresh}
    if len(episode) in (8, 17):
        return {":": 1.0} if len(episode) == 8 else {";": 1.0}
    return {k: 0.25 for k in pairs} if len(episode) % 2 else {pairs[episode[-1]]: 1.0}


def next_in_copy(past):
    episode = past[len(past) // 18 * 18 :]
    if len(episode) < 8:
        return {letter: 1 / 16 for letter in "ijklmnopqrstuvwx"}
    return {"|": 1.0} if len(episode) == 8 else {";": 1.0} if len(episode) == 17 else {episode[len(episode) - 9]: 1.0}


def next_in_brackets(past, depth=4):
    closing, stack = dict(zip("([{<", ")]}>", strict=True)), []
    for symbol in past:
        stack.append(closing[symbol]) if symbol in closing else stack.pop()
    opening = 1.0 if not stack else 0.0 if len(stack) == depth else 0.5
    return {symbol: opening / 4 for symbol in closing if opening} | ({stack[-1]: 1 - opening} if stack else {})


PREDICTORS = dict(zip(DOMAINS, (next_in_arithmetic, next_in_brackets, next_in_recall, next_in_copy), strict=True))


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_perfect_predictor_pays_the_entropy(domain):
    tokens, nats = draw(draw_domain, domain, 300, 45, seed=1)
    paid = torch.tensor(
        [[-math.log(PREDICTORS[domain](text[:t])[text[t]]) for t in range(45)] for text in texts_of(tokens)]
    )
    assert domain_entropy(domain, 45) == pytest.approx(nats.mean().item())
    if domain != "brackets":  # the same at each place, whatever was drawn
        torch.testing.assert_close(paid.double(), nats.expand(300, 45), rtol=1e-6, atol=1e-6)
    assert abs(paid.mean().item() - nats.mean().item()) < 0.006


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_bracket_entropy_equals_the_sum_over_all_texts(depth):
    def entropy(past, chance, length):
        if len(past) == length:
            return -chance * math.log(chance)
        nexts = next_in_brackets(past, depth).items()
        return sum(entropy(past + symbol, chance * p, length) for symbol, p in nexts)

    nats = draw(brackets, 1, 5, depth=depth)[1].cumsum(0)
    for length in (1, 2, 3, 5):
        assert entropy("", 1.0, length) == pytest.approx(nats[length - 1].item(), rel=1e-12)


SHORT = {
    "arithmetic": (arithmetic, 7, {}),
    "recall": (recall, 6, {"pairs": 1}),
    "recall two": (recall, 4, {"pairs": 2}),
    "copy": (copy, 6, {"width": 2}),
    "brackets": (brackets, 4, {}),
    "brackets low": (brackets, 6, {"depth": 2}),
}


@pytest.mark.parametrize(("maker", "length", "options"), SHORT.values(), ids=SHORT.keys())
def test_counting_texts_gives_the_claimed_entropy(maker, length, options):
    n = 300_000
    tokens, nats = draw(maker, n, length, **options)
    counts = torch.unique(tokens @ 64 ** torch.arange(length), return_counts=True)[1].double()
    counted = -(counts / n * (counts / n).log()).sum().item() + (len(counts) - 1) / (2 * n)  # Miller and Madow
    assert counted == pytest.approx(nats.sum().item(), abs=0.004)


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_text_obeys_its_rule_and_uses_all_its_freedom(domain):
    tokens, _ = draw(draw_domain, domain, 400, 40, seed=2)
    texts, seen, allowed = texts_of(tokens), Counter(), set()
    for text in texts:
        for t in range(40):
            choices = PREDICTORS[domain](text[:t])
            assert text[t] in choices
            seen[text[t]] += 1
            allowed |= choices.keys()
    assert seen.keys() == allowed


def test_windows_name_their_domain_and_share_it_equally():
    windows, which = domain_windows(("copy", "recall"), 31, 20, seed=5)
    assert windows.shape == (31, 21) and int(windows.max()) < DOMAIN_VOCAB_SIZE
    assert sorted(Counter(which.tolist()).values()) == [15, 16] and which.tolist() != sorted(which.tolist())
    assert windows[:, 0].tolist() == [DOMAINS.index(("copy", "recall")[i]) for i in which]
    for domain, text in zip(which, texts_of(windows[:, 1:]), strict=True):
        predictor = (next_in_copy, next_in_recall)[domain]
        assert all(text[t] in predictor(text[:t]) for t in range(20))


def test_windows_are_a_function_of_their_seed():
    first, again, other = (domain_windows(DOMAINS, 9, 11, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert domain_windows(DOMAINS, 2, 5)[0].shape == (2, 6)  # fewer windows than domains


def test_bad_requests_are_named():
    for bad in (lambda: draw(draw_domain, "poetry", 1, 5), lambda: domain_windows(["poetry"], 3, 5)):
        with pytest.raises(ValueError, match="unknown domain 'poetry'; choose from arithmetic"):
            bad()
    for domains, n_windows, seq_len in (((), 3, 5), (DOMAINS, 0, 5), (DOMAINS, 3, 0)):
        with pytest.raises(ValueError, match="at least"):
            domain_windows(domains, n_windows, seq_len)


def test_the_names_can_be_had_from_data_as_well():
    assert data.domain_windows is domain_windows and data.DOMAINS is DOMAINS and data.draw_domain is draw_domain
