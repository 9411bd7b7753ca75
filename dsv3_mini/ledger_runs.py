"""Everything the book built, in one run, and an account of what was reproduced and what was not.

Generated from chapters/17_whole_system.ipynb; edit the chapter, not this file.
"""

from collections.abc import Iterator

from dsv3_mini.ablations import recipe_run

# What do the logs say?


SMALL = dict(hidden_size=64, num_hidden_layers=3, q_lora_rank=48, kv_lora_rank=32, intermediate_size=160)
SMALL |= dict(moe_intermediate_size=32)


def ledger_runs(seeds: int = 3) -> Iterator[dict]:
    """Routing without the limit to groups, beside the recipe's; MTP with and without at a smaller size."""
    for seed in range(seeds):
        yield recipe_run("limited to two groups", seed)
        yield recipe_run("any group", seed, model={"n_group": 1, "topk_group": 1})
        yield recipe_run("small, with MTP", seed, model=SMALL)
        yield recipe_run("small, without", seed, model={**SMALL, "num_nextn_predict_layers": 0})
