"""The forty-two claims, each with the report's number, the chapter that shows it, and what measures it.

Generated from chapters/17_whole_system.ipynb; edit the chapter, not this file.
"""

from dsv3_mini import evidence, proofs
from dsv3_mini.ledger import Claim

# What do the logs say?


ARCHITECTURE = [
    Claim(1, "2 architecture", "MLA caches one latent a token", "70,272 against 4,997,120 bytes", 3, proofs.cache_size),
    Claim(2, "2 architecture", "absorbed attention is the same function", "an identity", 3, proofs.absorption),
    Claim(
        3,
        "2 architecture",
        "MLA ≥ MHA > GQA > MQA",
        "V2: BBH 50.7, 46.6 large; 37.0, 35.6, 33.2",
        3,
        evidence.attention_order,
    ),
    Claim(4, "2 architecture", "position must travel apart from content", "V2, section 2.1.3", 3, proofs.decoupling),
    Claim(5, "2 architecture", "the weights want interleaved pairs", "the published code", 2, proofs.rope_layout),
    Claim(
        6,
        "2 architecture",
        "a bias balances better than a loss, at no cost",
        "MaxVio 0.72 to 0.04, PPL 9.56 to 9.50",
        5,
        evidence.balancing,
    ),
    Claim(
        7,
        "2 architecture",
        "the bias has a right speed",
        "1e-4 slow, 1e-3 right, 1e-2 restless",
        5,
        evidence.bias_speed,
    ),
    Claim(
        8, "2 architecture", "the bias changes the choice, not the weight", "section 2.1.2", 4, proofs.bias_in_weight
    ),
    Claim(
        9,
        "4 pre-training",
        "balance over batches is enough",
        "loss 2.258 by sequence, 2.253 by bias or batch",
        5,
        evidence.balance_scope,
    ),
    Claim(10, "4 pre-training", "free experts specialise more", "figure 9", 5, evidence.specialised),
    Claim(
        11,
        "2 architecture",
        "a token visits at most four nodes, at little cost",
        "4 of 8; 5.29 without a limit",
        4,
        proofs.nodes_of_a_token,
    ),
    Claim(
        12,
        "2 architecture",
        "the first layer balances slowest, so it is dense",
        "three dense layers",
        5,
        evidence.first_layer,
    ),
    Claim(13, "2 architecture", "with balance, no token need be dropped", "none dropped", 5, evidence.dropped),
    Claim(
        14,
        "2 architecture",
        "sigmoid affinities suit the bias better",
        "PPL 9.599 softmax, 9.50 sigmoid",
        11,
        evidence.gate_function,
    ),
    Claim(
        15,
        "4 pre-training",
        "MTP helps on tasks, not on bits per byte",
        "BPB 0.729 both; HumanEval 20.7 to 26.8",
        6,
        evidence.prediction_module,
    ),
    Claim(
        16,
        "5 post-training",
        "a drafted token speeds decoding up",
        "accepted 85 to 90 %, 1.8 times",
        13,
        evidence.speculation,
    ),
]


SYSTEM = [
    Claim(
        17, "3 infrastructure", "FP8 training costs next to nothing", "loss error below 0.25 %", 7, evidence.fp8_loss
    ),
    Claim(18, "3 infrastructure", "fine scales survive outliers", "tiles and blocks of 128", 7, proofs.outliers),
    Claim(
        19, "3 infrastructure", "square blocks spoil gradients", "diverged on a 16B model", 7, proofs.gradient_blocks
    ),
    Claim(
        20,
        "3 infrastructure",
        "short sums err, promotion mends it",
        "2 % at K = 4096; every 128",
        7,
        proofs.accumulation,
    ),
    Claim(21, "3 infrastructure", "powers of two as scales cost little", "used for dispatch", 7, proofs.power_scales),
    Claim(
        22, "3 infrastructure", "moments may be BF16, weights may not", "section 3.3.3", 7, proofs.optimizer_precision
    ),
    Claim(
        23, "3 infrastructure", "DualPipe's bubble and memory", "(PP/2 - 1)(F&B + B - 3W), PP + 1", 8, proofs.dualpipe
    ),
    Claim(24, "3 infrastructure", "messages hide behind products at 1 : 1", "figure 4", 8, proofs.overlap),
    Claim(25, "3 infrastructure", "3.2 experts a node for one crossing", "160 and 50 GB/s", 9, proofs.traffic),
    Claim(26, "1 cost", "2.788M hours, $5.576M", "180K hours a trillion tokens", 0, proofs.cost),
    Claim(27, "1 cost", "671B stored, 37B active", "671B, 37B", 0, proofs.sparsity),
    Claim(28, "4 pre-training", "the learning rate's schedule", "2.2e-4, 2.2e-5, 7.3e-6", 11, proofs.rate_schedule),
    Claim(
        29,
        "4 pre-training",
        "a short tuning reads 16 times further",
        "needles found everywhere",
        12,
        evidence.long_context,
    ),
    Claim(30, "4 pre-training", "the temperature of YaRN matters", "0.1 ln s + 1, squared", 12, evidence.temperature),
    Claim(31, "4 pre-training", "filling gaps costs the loss nothing", "rate 0.1", 11, evidence.infilling),
]


REST = [
    Claim(32, "5 post-training", "group-relative rewards need no critic", "equations 26 to 28", 14, evidence.rewarded),
    Claim(
        33,
        "5 post-training",
        "distilled reasoning: more right, longer",
        "MATH-500 74.6 to 83.2, 769 to 1510 tokens",
        14,
        evidence.distilled,
    ),
    Claim(34, "3 infrastructure", "EPLB evens the load", "1.208 and 1.242 on its example", 9, proofs.placement),
    Claim(35, "3 infrastructure", "redundant experts lower the peak", "32 on 32 GPUs", 9, proofs.redundancy),
    Claim(
        36,
        "1 cost",
        "generation 3 times faster, 60 tokens/s",
        "the launch post",
        13,
        None,
        "a service's batch, network and hardware; only claim 16 is in reach",
    ),
    Claim(37, "3 infrastructure", "the network allows 67 tokens/s", "14.76 ms a token", 9, proofs.decoding_time),
    Claim(38, "4 pre-training", "no irrecoverable spike, no rollback", "none in 14.8T tokens", 11, evidence.stability),
    Claim(
        39,
        "1 cost",
        "a mixture beats a dense model of equal FLOPs",
        "2448 against 250 GFLOP a token",
        11,
        evidence.dense_models,
    ),
    Claim(40, "4 pre-training", "ablations agree at two sizes", "15.7B and 228.7B", 6, evidence.two_sizes),
    Claim(
        41,
        "5 post-training",
        "post-training lifts skill more than facts",
        "best in maths, behind in facts; by proxy",
        14,
        evidence.skill_and_facts,
    ),
    Claim(
        42,
        "1 cost",
        "pre-training costs most, answers least",
        "95.5, 4.3 and 0.18 % of the hours",
        17,
        evidence.phase_shares,
    ),
]


CLAIMS = sorted([*ARCHITECTURE, *SYSTEM, *REST], key=lambda claim: claim.number)
