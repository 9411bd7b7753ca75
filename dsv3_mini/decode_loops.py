"""One token's pass through the model as plain loops, compiled: no operations to dispatch.

Generated from chapters/13_generation.ipynb; edit the chapter, not this file.
"""

import math

import numpy as np
from numba import njit

# What would a token cost if nothing were dispatched?


# "reassoc" lets a sum be taken in any order, and so in wide registers; "contract" fuses a product with its sum, "arcp"
# and "nsz" forgive the last bit of a division and the sign of zero. NaN and infinity keep their meaning. Machine code
# is kept on disk for a module, not for a notebook's cells, where an edit of a called function would go unnoticed.
compiled = njit(
    fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", nogil=True, cache=__name__ != "__main__"
)


@compiled
def dot(a, b):
    """Sum of a[k] b[k]."""
    total = a.dtype.type(0)
    for k in range(len(a)):
        total += a[k] * b[k]
    return total


@compiled
def two_dots(row, u, v):
    """row . u and row . v, reading the row once."""
    a = b = row.dtype.type(0)
    for k in range(len(row)):
        a += row[k] * u[k]
        b += row[k] * v[k]
    return a, b


@compiled
def linear(w, x, out):
    """Rows x @ w.T into out: (n, in), (T, in), (T, n). Each weight is read once for two rows."""
    n = len(x)
    for t in range(0, n - 1, 2):
        u, v = x[t], x[t + 1]
        for i in range(len(w)):
            out[t, i], out[t + 1, i] = two_dots(w[i], u, v)
    if n % 2:
        u = x[n - 1]
        for i in range(len(w)):
            out[n - 1, i] = dot(w[i], u)


@compiled
def rms_norm(x, gain, eps, out):
    """The first n columns of rows x over their root mean square, times the gain (n,), into out, which may be x."""
    for t in range(len(x)):
        row, to, total = x[t], out[t], x.dtype.type(0)
        for i in range(len(gain)):
            total += row[i] * row[i]
        scale = x.dtype.type(1 / math.sqrt(total / len(gain) + eps))
        for i in range(len(gain)):
            to[i] = row[i] * scale * gain[i]


@compiled
def rotate(x, cos, sin):
    """RoPE on one vector of pairs, in place."""
    for j in range(len(cos)):
        a, b = x[2 * j], x[2 * j + 1]
        x[2 * j] = a * cos[j] - b * sin[j]
        x[2 * j + 1] = a * sin[j] + b * cos[j]


@compiled
def softmax(scores):
    """Of one row, in place."""
    highest, total = scores[0], scores.dtype.type(0)
    for s in range(len(scores)):
        highest = max(highest, scores[s])
    for s in range(len(scores)):
        scores[s] = math.exp(scores[s] - highest)
        total += scores[s]
    for s in range(len(scores)):
        scores[s] /= total


@compiled
def write_latents(u, a, cache, start, cos, sin):
    """Normed tokens u (T, D) become cache rows start, start + 1, ...: latent after its norm, key after its turn."""
    new, latent = cache[start : start + len(u)], len(a.kv_norm)
    linear(a.kv_a, u, new)
    rms_norm(new, a.kv_norm, a.eps, new)
    for t in range(len(u)):
        rotate(new[t, latent:], cos[start + t], sin[start + t])


@compiled
def absorb(q, w_uk, scale, cos, sin):
    """One token's queries (H, nope + rope), times the softmax scale, carried into the latent's space: (H, C + rope)."""
    n_heads, nope, latent = w_uk.shape
    out = np.zeros((n_heads, latent + q.shape[1] - nope), q.dtype)
    for h in range(n_heads):
        row, to = q[h], out[h]
        for n in range(nope):
            weights, factor = w_uk[h, n], q.dtype.type(row[n] * scale)
            for c in range(latent):
                to[c] += factor * weights[c]
        for r in range(len(row) - nope):
            to[latent + r] = row[nope + r] * scale
        rotate(to[latent:], cos, sin)
    return out


@compiled
def attend(q, cache):
    """One token's absorbed queries (H, C + rope) over cached positions (S, C + rope): weighted sums (H, C + rope)."""
    scores, z = np.empty((len(q), len(cache)), q.dtype), np.zeros_like(q)
    for s in range(len(cache)):
        for h in range(len(q)):
            scores[h, s] = dot(q[h], cache[s])
    for h in range(len(q)):
        softmax(scores[h])
    for s in range(len(cache)):
        for h in range(len(q)):
            for c in range(q.shape[1]):
                z[h, c] += scores[h, s] * cache[s, c]
    return z


@compiled
def queries_of(u, a):
    """Queries (T, H * (nope + rope)) of normed tokens (T, D), through their own latent where there is one."""
    q = np.empty((len(u), len(a.q_b)), u.dtype)
    if len(a.q_a):
        c_q = np.empty((len(u), len(a.q_a)), u.dtype)
        linear(a.q_a, u, c_q)
        rms_norm(c_q, a.q_norm, a.eps, c_q)
        linear(a.q_b, c_q, q)
    else:
        linear(a.q_b, u, q)
    return q


@compiled
def add_attention(x, a, cache, start, cos, sin, n_written):
    """MLA on the tokens x (T, D) at positions start, start + 1, ...; the first n_written just enter the cache."""
    u, n_heads, width = np.empty_like(x), len(a.w_uv), a.w_uv.shape[1]
    rms_norm(x, a.norm, a.eps, u)
    write_latents(u, a, cache, start, cos, sin)
    q, left = queries_of(u[n_written:], a), x[n_written:]
    heads, change = np.empty((len(left), n_heads * width), x.dtype), np.empty_like(left)
    for t in range(len(left)):
        place = start + n_written + t
        z = attend(absorb(q[t].reshape(n_heads, -1), a.w_uk, a.scale, cos[place], sin[place]), cache[: place + 1])
        for h in range(n_heads):
            for v in range(width):
                heads[t, h * width + v] = dot(a.w_uv[h, v], z[h, : a.w_uv.shape[2]])
    linear(a.out, heads, change)
    for t in range(len(left)):
        for i in range(left.shape[1]):
            left[t, i] += change[t, i]


@compiled
def best_of(values, allowed):
    """Index of the largest allowed value, the first of equals."""
    best = -1
    for i in range(len(values)):
        if allowed[i] and (best < 0 or values[i] > values[best]):
            best = i
    return best


@compiled
def open_groups(choice, rules, allowed):
    """Leave allowed (E,) only where an expert belongs to one of the best groups."""
    size, worth = len(choice) // rules.n_group, np.empty(rules.n_group, choice.dtype)
    for g in range(rules.n_group):
        best = second = -np.inf
        for value in choice[g * size : (g + 1) * size]:
            best, second = max(best, value), max(second, min(best, value))
        worth[g] = best + second if rules.top_two else best
    waiting = np.ones(rules.n_group, np.bool_)
    for _ in range(rules.topk_group):
        waiting[best_of(worth, waiting)] = False
    for i in range(len(choice)):
        allowed[i] = not waiting[i // size]


@compiled
def choose(choice, rules):
    """`group_limited_topk` of chapter 04 for one token: (E,) -> (K,), best expert first."""
    allowed, experts = np.ones(len(choice), np.bool_), np.empty(rules.top_k, np.int64)
    if rules.n_group > 1:
        open_groups(choice, rules, allowed)
    for k in range(rules.top_k):
        experts[k] = best_of(choice, allowed)
        allowed[experts[k]] = False
    return experts


@compiled
def route(u, gate, bias, rules, weights):
    """The gate (E, D) on one normed token (D,): the chosen experts (K,), and what they weigh, into weights (K,)."""
    scores, choice = np.empty(len(gate), u.dtype), np.empty(len(gate), u.dtype)
    for i in range(len(gate)):
        scores[i] = dot(gate[i], u)
        if rules.sigmoid:
            scores[i] = 1 / (1 + math.exp(-scores[i]))
    if not rules.sigmoid:
        softmax(scores)
    for i in range(len(gate)):
        choice[i] = scores[i] + bias[i]
    experts, total = choose(choice, rules), 1e-20
    for i in experts:
        total += scores[i]
    for k in range(rules.top_k):
        weights[k] = rules.factor * scores[experts[k]] / (total if rules.normalised else 1.0)
    return experts


@compiled
def add_expert(x, u, gate_up, down, weight):
    """weight * SwiGLU(u) for one token's stream x (D,) and its normed state u (D,)."""
    width = len(gate_up) // 2
    hidden = np.empty(width, u.dtype)
    for f in range(width):
        gate = dot(gate_up[f], u)
        hidden[f] = weight * gate / (1 + math.exp(-gate)) * dot(gate_up[width + f], u)
    for i in range(len(x)):
        x[i] += dot(down[i], hidden)


@compiled
def add_feed_forward(x, m, rules):
    """The experts' sum for each token x (T, D), shared ones first."""
    u, weights, one = np.empty_like(x), np.empty(rules.top_k, x.dtype), x.dtype.type(1)
    rms_norm(x, m.norm, m.eps, u)
    for t in range(len(x)):
        if len(m.shared_gate_up):
            add_expert(x[t], u[t], m.shared_gate_up, m.shared_down, one)
        if len(m.gate):
            experts = route(u[t], m.gate, m.bias, rules, weights)
            for k in range(rules.top_k):
                add_expert(x[t], u[t], m.gate_up[experts[k]], m.down[experts[k]], weights[k])


@compiled
def add_layer(x, a, m, cache, start, cos, sin, rules, n_written):
    """Attention and experts on one text's tokens x (T, D) at positions start, start + 1, ..., in place.

    The first n_written tokens just enter the cache; what stands in their rows of x is then without meaning.
    """
    add_attention(x, a, cache, start, cos, sin, n_written)
    add_feed_forward(x[n_written:], m, rules)


@compiled
def join(h, embedded, w, eps):
    """An MTP layer's input from states (T, D) and the embeddings (T, D) of the tokens that follow them: (T, D)."""
    pairs, x = np.empty((len(h), 2 * h.shape[1]), h.dtype), np.empty_like(h)
    rms_norm(embedded, w.enorm, eps, pairs)
    rms_norm(h, w.hnorm, eps, pairs[:, h.shape[1] :])
    linear(w.eh_proj, pairs, x)
    return x
