"""Fine-tuning and distillation, measured: python -m dsv3_mini experiment post_training.

Generated from chapters/14_post_training.ipynb; edit the chapter, not this file.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dsv3_mini.balance import BiasBalancer
from dsv3_mini.baseline import fit, next_token_loss
from dsv3_mini.config import ModelConfig
from dsv3_mini.data import BOS, Batches, pack, token_ids
from dsv3_mini.model import DeepSeekV3
from dsv3_mini.moe import record_routing
from dsv3_mini.sft import Sample, complete, exchange, fine_tune, masked_loss, pack_samples
from dsv3_mini.verifiable import (
    Problem,
    draw_sum,
    exercise_book,
    exercise_tokenizer,
    is_correct,
    score,
    steps_on_clock,
    sum_on_clock,
    sums,
    town_facts,
    towns,
)

# What does a pretrained model do with a question?


def base_config() -> ModelConfig:
    """The book's model in its smallest size: MLA, one dense layer, one of 8 experts, no MTP."""
    heads = {"num_attention_heads": 4, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    width = {"hidden_size": 64, "intermediate_size": 192, "moe_intermediate_size": 64, "kv_lora_rank": 32}
    size = {"vocab_size": 264, "num_hidden_layers": 2, "q_lora_rank": None, "num_nextn_predict_layers": 0}
    rest = {"initializer_range": 0.06, "rope_theta": 100.0, "max_position_embeddings": 256}
    return ModelConfig.preset("nano", **heads, **experts, **width, **size, **rest)


def base_model(seed: int = 0, steps: int = 450, n_pages: int = 5000) -> tuple[DeepSeekV3, dict[str, str]]:
    """Pretrain on a fresh exercise book with chapter 02's loop and chapter 05's bias: the model, and its facts."""
    generator, tokenizer = torch.Generator().manual_seed(seed), exercise_tokenizer()
    facts = town_facts(48, generator)
    windows = pack(token_ids(tokenizer, exercise_book(n_pages, facts, generator)), 32)
    torch.manual_seed(seed)
    model = DeepSeekV3(base_config())
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.4)
    balancer = BiasBalancer(model, gamma=0.01)

    def loss_fn(model, batch):
        with record_routing(model) as routings:
            loss = next_token_loss(model, batch)
        balancer.observe(routings)
        return loss

    batches, options = Batches(windows, 32, seed), {"learning_rate": 6e-3, "cooldown": steps // 3, "progress": False}
    fit(model, batches, steps, loss_fn=loss_fn, after_step=lambda *_: balancer.step(), **options)
    return model, facts


# What does fine-tuning change?


SYSTEM = "check"  # the system message that asks for steps, and for a second pass over them


def long_answer(question: str) -> str:
    """Steps, the same steps once more as a check, and the box."""
    steps = steps_on_clock(question)
    return f"{steps};{steps}[{sum_on_clock(question)}]"


def original_answer(question: str, with_steps: bool = False) -> str:
    """The box, behind the steps or alone."""
    return f"{steps_on_clock(question) if with_steps else ''}[{sum_on_clock(question)}]"


def town_lessons(tokenizer: Tokenizer, facts: dict[str, str]) -> list[Sample]:
    """Every other town as a question and its answer, so that the form is known; the rest is for the test."""
    return [exchange(tokenizer, town, f"[{land}]") for town, land in list(facts.items())[::2]]


def lesson_windows(tokenizer: Tokenizer, samples: Sequence[Sample], facts: dict[str, str], seed: int) -> Tensor:
    """Samples and town lessons, shuffled and packed into windows of 64 tokens: (n, 3, 64)."""
    samples = [*samples, *town_lessons(tokenizer, facts)]
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    return pack_samples([samples[i] for i in order], 63)


def distinct_sums(n: int, generator: torch.Generator) -> list[str]:
    """n different questions for lessons; ValueError for more than 400, of the 475 that are not held out."""
    if n > 400:
        raise ValueError(f"n={n} exceeds 400: there are 475 sums of four that are not held out")
    found: dict[str, None] = {}
    while len(found) < n:
        found[draw_sum(4, generator)] = None
    return list(found)


def student_model(
    base: DeepSeekV3, facts: dict[str, str], lessons: dict[str, str], seed: int = 0, change: Callable | None = None
) -> DeepSeekV3:
    """A copy of base fine-tuned on {question: answer}, no system message. change: applied to the windows first."""
    tokenizer, model = exercise_tokenizer(), copy.deepcopy(base)
    samples = [exchange(tokenizer, question, answer) for question, answer in lessons.items()]
    windows = lesson_windows(tokenizer, samples, facts, seed)
    if change:
        change(windows)
    fine_tune(model, windows, batch_size=4, peak=2e-3, final=4e-4, seed=seed)
    return model


def mark_everything(windows: Tensor) -> None:
    """The trap: a mask of ones on every token of every sample."""
    windows[:, 1] = windows[:, 2] >= 0


def forget_owners(windows: Tensor) -> None:
    """As in pre-training: everything in a window may look back at everything."""
    windows[:, 2] = 0


# What can a teacher add?


def expert_model(base: DeepSeekV3, facts: dict[str, str], seed: int = 0, n: int = 400) -> DeepSeekV3:
    """A copy of base fine-tuned on the report's two forms: question, original answer; SYSTEM, question, long answer.

    A third of the original answers show their steps; no long answer comes without the system message (section 5.1).
    """
    tokenizer, generator, model = exercise_tokenizer(), torch.Generator().manual_seed(seed), copy.deepcopy(base)
    questions = [draw_sum(4, generator) for _ in range(n)]
    samples = [exchange(tokenizer, q, original_answer(q, i % 3 == 0)) for i, q in enumerate(questions)]
    samples += [exchange(tokenizer, q, long_answer(q), SYSTEM) for q in questions]
    fine_tune(model, lesson_windows(tokenizer, samples, facts, seed), seed=seed)
    return model


def rejection_sample(
    teacher: DeepSeekV3, questions: Sequence[str], n_tries: int = 4, temperature: float = 1.0, seed: int = 0
) -> dict[str, str]:
    """The shortest correct answer of n_tries that the teacher gives under SYSTEM; a question without one is dropped."""
    tokenizer, kept = exercise_tokenizer(), {}
    problems = [Problem(q, sum_on_clock(q), exchange(tokenizer, q, system=SYSTEM).ids) for q in questions]
    for n in range(n_tries):
        tried = complete(teacher, [p.prompt for p in problems], temperature=temperature, seed=seed + n * len(problems))
        for problem, completion in zip(problems, tried, strict=True):
            text = tokenizer.decode(completion)
            shorter = len(text) < len(kept.get(problem.question, text + "."))
            if shorter and is_correct(tokenizer, problem, completion):
                kept[problem.question] = text
    return kept


@torch.no_grad()
def question_nats(model: DeepSeekV3, problems: Sequence[Problem]) -> float:
    """Mean nats of the tokens of questions of one length: how well the model would write them itself."""
    ids = torch.tensor([problem.prompt for problem in problems])
    mask = torch.zeros_like(ids)
    mask[:, 2:-1] = 1  # behind bos and the user's token, before the assistant's
    return masked_loss(model(ids[:, :-1]), ids, mask).item()


def page_share(model: DeepSeekV3, pages: dict[str, str]) -> float:
    """Share of texts {start: rest} that the model completes as a page would: greedily, character for character."""
    tokenizer, length = exercise_tokenizer(), max(map(len, pages.values()))
    found = complete(model, [[BOS, *ids] for ids in token_ids(tokenizer, list(pages))], length)
    pairs = zip(found, pages.values(), strict=True)
    return sum(tokenizer.decode(ids).startswith(rest) for ids, rest in pairs) / len(pages)


def examine(model: DeepSeekV3, facts: dict[str, str], system: str = "", n: int = 150) -> dict[str, float]:
    """Greedy answers to sums that were held out, and to towns that no lesson asked for.

    "accuracy" and mean "length" on sums, "recall" of towns; "page accuracy" and "page recall" of the same, begun as a
    page of the exercise book would begin them; "question nats" of the sums.
    """
    tokenizer, rest = exercise_tokenizer(), dict(list(facts.items())[1::2])
    generators = (torch.Generator().manual_seed(1000) for _ in range(2))
    problems, plain = (sums(tokenizer, n, g, s, held_out=True) for g, s in zip(generators, (system, ""), strict=True))
    accuracy, length = score(tokenizer, problems, complete(model, [p.prompt for p in problems]))
    asked = towns(tokenizer, rest)
    recall, _ = score(tokenizer, asked, complete(model, [p.prompt for p in asked], max_new_tokens=8))
    found = {"accuracy": accuracy, "length": length, "recall": recall, "question nats": question_nats(model, plain)}
    found["page accuracy"] = page_share(model, {f"{p.question}:": original_answer(p.question, True) for p in plain})
    found["page recall"] = page_share(model, {f"{town}:[": land for town, land in rest.items()})
    return {name: round(x, 3) for name, x in found.items()}


def seed_variants(seed: int, n: int, steps: int) -> Iterator[tuple[str, dict, dict]]:
    """(variant, results, what else to log) of one seed: base, expert, and students of different lessons and windows."""
    base, facts = base_model(seed, steps)
    yield "base", examine(base, facts), {}
    expert = expert_model(base, facts, seed, n)
    yield "expert", examine(expert, facts), {}
    yield "expert, asked to check", examine(expert, facts, SYSTEM), {}
    generator = torch.Generator().manual_seed(100 + seed)
    questions = distinct_sums(n, generator)
    accepted = rejection_sample(expert, questions, seed=seed)
    short = {question: original_answer(question) for question in accepted}
    yield "short answers", examine(student_model(base, facts, short, seed), facts), {"lessons": len(short)}
    log = {"lessons": len(accepted), "questions": len(questions)}
    yield "distilled", examine(student_model(base, facts, accepted, seed), facts), log
    for name, change in (("mask of ones", mark_everything), ("no sample masking", forget_owners)):
        yield name, examine(student_model(base, facts, accepted, seed, change), facts), log


def post_training_runs(seeds: int = 3, n: int = 400, steps: int = 450) -> Iterator[dict]:
    """Every variant for every seed, each seed with an exercise book, facts and lessons of its own.

    n: questions of the lessons, 400 at most; steps: of pre-training.
    """
    for seed in range(seeds):
        started = time.perf_counter()
        for variant, results, log in seed_variants(seed, n, steps):
            seconds, started = round(time.perf_counter() - started, 1), time.perf_counter()
            run = {"variant": variant, "seed": seed, "seconds": seconds, "results": results}
            yield {**run, **log, "config": base_config().to_dict()}
