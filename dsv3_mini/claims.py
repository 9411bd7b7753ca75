"""The forty-two claims, each with the report's number, the chapter that shows it, and what measures it.

Generated from chapters/17_whole_system.ipynb; edit the chapter, not this file.
"""

from dsv3_mini import evidence, proofs
from dsv3_mini.ledger import Claim

# What do the logs say?


def of_section(section: str, *rows: tuple) -> list[Claim]:
    """Claims of one section of the report, from rows of their other fields."""
    return [Claim(number, section, *fields) for number, *fields in rows]


COST = of_section(
    "1 cost",
    (26, "2.788M hours, $5.576M", "180K hours a trillion tokens", 0, proofs.cost),
    (27, "671B stored, 37B active", "671B, 37B", 0, proofs.sparsity),
    (
        36,
        "generation 3 times faster, 60 tokens/s",
        "the launch post",
        13,
        None,
        "a service's batch, network and hardware; only claim 16 is in reach",
    ),
    (39, "a mixture beats a dense model of equal FLOPs", "2448 against 250 GFLOP a token", 11, evidence.dense_models),
    (42, "pre-training costs most, answers least", "95.5, 4.3 and 0.18 % of the hours", 17, evidence.phase_shares),
)


ARCHITECTURE = of_section(
    "2 architecture",
    (1, "MLA caches one latent a token", "70,272 against 4,997,120 bytes", 3, proofs.cache_size),
    (2, "absorbed attention is the same function", "an identity", 3, proofs.absorption),
    (3, "MLA ≥ MHA > GQA > MQA", "V2: BBH 50.7, 46.6 large; 37.0, 35.6, 33.2", 3, evidence.attention_order),
    (4, "position must travel apart from content", "V2, section 2.1.3", 3, proofs.decoupling),
    (5, "the weights want interleaved pairs", "the published code", 2, proofs.rope_layout),
    (
        6,
        "a bias balances better than a loss, at no cost",
        "MaxVio 0.72 to 0.04, PPL 9.56 to 9.50",
        5,
        evidence.balancing,
    ),
    (7, "the bias has a right speed", "1e-4 slow, 1e-3 right, 1e-2 restless", 5, evidence.bias_speed),
    (8, "the bias changes the choice, not the weight", "section 2.1.2", 4, proofs.bias_in_weight),
    (
        11,
        "a token visits at most four nodes, at little cost",
        "4 of 8; 5.29 without a limit",
        4,
        proofs.nodes_of_a_token,
    ),
    (12, "the first layer balances slowest, so it is dense", "three dense layers", 5, evidence.first_layer),
    (13, "with balance, no token need be dropped", "none dropped", 5, evidence.dropped),
    (14, "sigmoid affinities suit the bias better", "PPL 9.599 softmax, 9.50 sigmoid", 11, evidence.gate_function),
)


INFRASTRUCTURE = of_section(
    "3 infrastructure",
    (17, "FP8 training costs next to nothing", "loss error below 0.25 %", 7, evidence.fp8_loss),
    (18, "fine scales survive outliers", "tiles and blocks of 128", 7, proofs.outliers),
    (19, "square blocks spoil gradients", "diverged on a 16B model", 7, proofs.gradient_blocks),
    (20, "short sums err, promotion mends it", "2 % at K = 4096; every 128", 7, proofs.accumulation),
    (21, "powers of two as scales cost little", "used for dispatch", 7, proofs.power_scales),
    (22, "moments may be BF16, weights may not", "section 3.3.3", 7, proofs.optimizer_precision),
    (23, "DualPipe's bubble and memory", "(PP/2 - 1)(F&B + B - 3W), PP + 1", 8, proofs.dualpipe),
    (24, "messages hide behind products at 1 : 1", "figure 4", 8, proofs.overlap),
    (25, "3.2 experts a node for one crossing", "160 and 50 GB/s", 9, proofs.traffic),
    (34, "EPLB evens the load", "1.208 and 1.242 on its example", 9, proofs.placement),
    (35, "redundant experts lower the peak", "32 on 32 GPUs", 9, proofs.redundancy),
    (37, "the network allows 67 tokens/s", "14.76 ms a token", 9, proofs.decoding_time),
)


PRE_TRAINING = of_section(
    "4 pre-training",
    (9, "balance over batches is enough", "loss 2.258 by sequence, 2.253 by bias or batch", 5, evidence.balance_scope),
    (10, "free experts specialise more", "figure 9", 5, evidence.specialised),
    (
        15,
        "MTP helps on tasks, not on bits per byte",
        "BPB 0.729 both; HumanEval 20.7 to 26.8",
        6,
        evidence.prediction_module,
    ),
    (28, "the learning rate's schedule", "2.2e-4, 2.2e-5, 7.3e-6", 11, proofs.rate_schedule),
    (29, "a short tuning reads 16 times further", "needles found everywhere", 12, evidence.long_context),
    (30, "the temperature of YaRN matters", "0.1 ln s + 1, squared", 12, evidence.temperature),
    (31, "filling gaps costs the loss nothing", "rate 0.1", 11, evidence.infilling),
    (38, "no irrecoverable spike, no rollback", "none in 14.8T tokens", 11, evidence.stability),
    (40, "ablations agree at two sizes", "15.7B and 228.7B", 6, evidence.two_sizes),
)


POST_TRAINING = of_section(
    "5 post-training",
    (16, "a drafted token speeds decoding up", "accepted 85 to 90 %, 1.8 times", 13, evidence.speculation),
    (32, "group-relative rewards need no critic", "equations 26 to 28", 14, evidence.rewarded),
    (
        33,
        "distilled reasoning: more right, longer",
        "MATH-500 74.6 to 83.2, 769 to 1510 tokens",
        14,
        evidence.distilled,
    ),
    (
        41,
        "post-training lifts skill more than facts",
        "best in maths, behind in facts; by proxy",
        14,
        evidence.skill_and_facts,
    ),
)


CLAIMS = sorted([*COST, *ARCHITECTURE, *INFRASTRUCTURE, *PRE_TRAINING, *POST_TRAINING], key=lambda claim: claim.number)
