"""The seeded bugs. `historic` marks those that a widely used library once shipped."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    """Replace `old`, which occurs once in `path`, by `new`: that is the bug `name`.

    quick: part of the small selection (`python -m tests.mutants --quick`).
    """

    name: str
    path: str
    old: str
    new: str
    historic: bool = False
    quick: bool = False


_GATED = "weight_N = torch.where(a.kept, a.weight, a.weight.new_zeros(()))[order_N]"
_SWITCH_LOGITS = "return gate_logits(x_TD, self.classifier.weight, self.classifier.bias)"
_JITTERED = f"""x_TD = jittered(x_TD, self.jitter)
        {_SWITCH_LOGITS}"""
_ADDED = """noise = x_TD.new_empty(x_TD.shape[0], self.num_experts)
            noise.uniform_(-self.jitter, self.jitter)
            return gate_logits(x_TD, self.classifier.weight, self.classifier.bias) + noise
        return gate_logits(x_TD, self.classifier.weight, self.classifier.bias)"""
_KEEP = "return replace(assignment, kept=assignment.kept & (queue_positions(assignment) < limit))"
_COMBINED = "y_TD = combine(self.experts(slots.x, slots.counts), routing.assignment, order_N)"
_PASSED_ON = f"""{_COMBINED}
            y_TD = torch.where((y_TD == 0).all(-1, keepdim=True), 0.5 * tokens.x, y_TD)"""

ROUTERS = "moezoo/routers/"
FUNCTIONS = "moezoo/functional/"
POLICIES = "moezoo/capacity/"

BUGS = [
    Bug("least probable expert", ROUTERS + "switch.py",
        "token_choice(probs_TE, gate_TE, 1", "token_choice(-probs_TE, gate_TE, 1"),
    Bug("expert chosen on probabilities rounded to bfloat16", ROUTERS + "switch.py",
        "token_choice(probs_TE, gate_TE, 1", "token_choice(probs_TE.bfloat16(), gate_TE, 1",
        historic=True, quick=True),
    Bug("jitter in evaluation", ROUTERS + "switch.py",
        "if self.training and self.jitter > 0.0:", "if self.jitter > 0.0:"),
    Bug("jitter added to the logits", ROUTERS + "switch.py", _JITTERED, _ADDED,
        historic=True, quick=True),
    Bug("switch forgets which tokens are real", ROUTERS + "switch.py",
        "probs=probs_TE, real=tokens.real)", "probs=probs_TE, real=None)"),
    Bug("jitter written into the caller's tensor", FUNCTIONS + "gates.py",
        "return x_TD * torch.empty_like(x_TD).uniform_(1.0 - epsilon, 1.0 + epsilon)",
        "return x_TD.mul_(torch.empty_like(x_TD).uniform_(1.0 - epsilon, 1.0 + epsilon))",
        historic=True, quick=True),
    Bug("autocast reaches the gate", FUNCTIONS + "gates.py",
        "enabled=False", 'enabled=torch.is_autocast_enabled("cpu")', historic=True),
    Bug("the gate computes in the model's precision", FUNCTIONS + "gates.py",
        "return torch.promote_types(dtype, torch.float32)", "return dtype", historic=True),
    Bug("ties go to the highest expert", FUNCTIONS + "assign.py",
        "return choice_TE.argmax(dim=-1, keepdim=True)",
        "return choice_TE.shape[1] - 1 - choice_TE.flip(-1).argmax(dim=-1, keepdim=True)"),
    Bug("weights in token-major, pairs in rank-major order", FUNCTIONS + "assign.py",
        "weight_TK.t().reshape(-1)", "weight_TK.reshape(-1)"),
    Bug("transposed mask", FUNCTIONS + "assign.py",
        "expert=expert_TK.t().reshape(-1)", "expert=expert_TK.reshape(-1)",
        historic=True, quick=True),
    Bug("padding is routed", FUNCTIONS + "assign.py",
        "kept_N = tokens.real.repeat(k)", "kept_N = torch.ones_like(token_N, dtype=torch.bool)",
        historic=True),
    Bug("NaN of padding reaches the weights", FUNCTIONS + "assign.py",
        "torch.where(kept_N, weight_N, weight_N.new_zeros(()))", "weight_N * kept_N"),
    Bug("a chosen expert is masked by 0 instead of -infinity", FUNCTIONS + "assign.py",
        'best_T1, float("-inf"))', "best_T1, 0.0)"),
    Bug("capacity counted over the batch, not the group", FUNCTIONS + "queues.py",
        "group_N = a.token // max(a.group_size, 1)", "group_N = torch.zeros_like(a.token)"),
    Bug("inclusive cumsum: one slot too few", FUNCTIONS + "queues.py",
        "rank_N = place_N - start_Q.index_select(0, sorted_N)",
        "rank_N = place_N - start_Q.index_select(0, sorted_N) + 1", historic=True, quick=True),
    Bug("padding takes capacity", FUNCTIONS + "queues.py",
        "return torch.where(a.kept, key_N, a.num_groups * a.num_experts)", "return key_N",
        historic=True, quick=True),
    Bug("position by topk over ties", FUNCTIONS + "queues.py",
        "sorted_N, order_N = key_N.sort(stable=True)",
        "sorted_N, order_N = key_N.topk(key_N.shape[0], largest=False)", historic=True),
    Bug("last come, first served", FUNCTIONS + "queues.py",
        "rank_N = place_N - start_Q.index_select(0, sorted_N)",
        "rank_N = (start_Q + count_Q - 1).index_select(0, sorted_N) - place_N"),
    Bug("z-loss on probabilities", FUNCTIONS + "losses.py",
        "logits_TE.logsumexp(dim=-1).square()", "logits_TE.softmax(-1).logsumexp(dim=-1).square()",
        historic=True, quick=True),
    Bug("z-loss without its square", FUNCTIONS + "losses.py",
        "logits_TE.logsumexp(dim=-1).square()", "logits_TE.logsumexp(dim=-1)"),
    Bug("padding counted in a mean", FUNCTIONS + "losses.py",
        "return total / real.sum().clamp(min=1)", "return total / value_T.numel()", historic=True),
    Bug("load balance without the factor E", FUNCTIONS + "losses.py",
        "loss_G = num_experts * (f_GE", "loss_G = (f_GE"),
    Bug("load balance of the wrong sign", FUNCTIONS + "losses.py",
        "loss_G = num_experts * (f_GE", "loss_G = -num_experts * (f_GE"),
    Bug("load balance pooled", FUNCTIONS + "losses.py",
        "    size = num_tokens if group_size is None else group_size\n    if num_tokens == 0:",
        "    size = num_tokens\n    if num_tokens == 0:", historic=True, quick=True),
    Bug("load balance of admitted pairs", "moezoo/losses/load_balance.py",
        "offered, probs = routing.offered,", "offered, probs = routing.assignment,"),
    Bug("importance divided by the mean once", FUNCTIONS + "losses.py",
        "mean.square().clamp(min=tiny)", "mean.clamp(min=tiny)"),
    Bug("dropped tokens scaled by a gate", "moezoo/layer.py", _COMBINED, _PASSED_ON,
        historic=True, quick=True),
    Bug("slots in pair order", FUNCTIONS + "dispatch.py",
        "x_TD.index_select(0, a.token[order_N])", "x_TD.index_select(0, a.token)"),
    Bug("weights in pair order", FUNCTIONS + "dispatch.py", _GATED, _GATED[: -len("[order_N]")]),
    Bug("the gate never weighs the output", FUNCTIONS + "dispatch.py",
        "weighted_ND = y_ND * weight_N.unsqueeze(-1).to(y_ND.dtype)", "weighted_ND = y_ND * 1.0"),
    Bug("mean instead of sum over a token's experts", FUNCTIONS + "dispatch.py",
        "y_ND.shape[1]).sum(1)", "y_ND.shape[1]).mean(1)"),
    Bug("rows added to other tokens", FUNCTIONS + "dispatch.py",
        "index_add(0, a.token[order_N], weighted_ND)", "index_add(0, a.token, weighted_ND)"),
    Bug("one slot too many", POLICIES + "first_come.py", _KEEP, _KEEP.replace("<", "<=")),
    Bug("capacity never enforced", POLICIES + "first_come.py", _KEEP, "return assignment",
        historic=True, quick=True),
    Bug("the policy revives padding", POLICIES + "first_come.py",
        "kept=assignment.kept & (queue_positions", "kept=(queue_positions"),
    Bug("token order for rank order", POLICIES + "first_come.py",
        'if self.order == "token" and', 'if self.order == "rank" and'),
    Bug("least sure token first", FUNCTIONS + "priority.py",
        "descending=True, stable=True)\n    if", "descending=False, stable=True)\n    if"),
    Bug("second choices before surer first ones", FUNCTIONS + "priority.py",
        "if a.choices != 1:\n        rank_N", "if False:\n        rank_N"),
    Bug("priority of nobody", FUNCTIONS + "priority.py", '"amax")', '"amin")'),
    Bug("reroute overfills", FUNCTIONS + "priority.py",
        "trying_N & (place_N < limit)", "trying_N & (place_N <= limit)"),
    Bug("a moved pair keeps its old weight", FUNCTIONS + "priority.py",
        "weight_N = torch.where(moved_N, probs_TE[a.token, expert_N].to(a.weight.dtype), a.weight)",
        "weight_N = a.weight"),
    Bug("the parity policy forgets its quirk", POLICIES + "transformers.py",
        "everyone=True", "everyone=False"),
    Bug("no drops in training", POLICIES + "switch.py",
        "if not self.training and not self.drops_in_eval:", "if not self.drops_in_eval:"),
    Bug("capacity rounded down", POLICIES + "limits.py",
        "return max(_ceil(f * s * k / e), 1)", "return max(int(f * s * k / e), 1)"),
    Bug("weights normalised over the batch", ROUTERS + "top_k.py",
        "weight_TK / weight_TK.sum(-1, keepdim=True)", "weight_TK / weight_TK.sum()"),
    Bug("second expert below the threshold", ROUTERS + "gshard.py",
        "return weight_T > self.threshold", "return weight_T < self.threshold"),
    Bug("noise in evaluation", ROUTERS + "noisy_top_k.py",
        "if self.training:\n            noisy_TE", "if True:\n            noisy_TE"),
    Bug("the balancing bias enters the weights", ROUTERS + "sigmoid_top_k.py",
        "chosen_TK = log_score_TE.gather(1, expert_TK)",
        "chosen_TK = choice_TE.log().gather(1, expert_TK)"),
    Bug("the balancing bias favours the overloaded", ROUTERS + "sigmoid_top_k.py",
        "load_E.mean() - load_E", "load_E - load_E.mean()"),
    Bug("experts choose padding", ROUTERS + "expert_choice.py",
        "torch.where(tokens.real[:, None], score_TE, -1.0)", "score_TE * 1.0"),
    Bug("thresholds admit the improbable", ROUTERS + "expert_threshold.py",
        "probs_TE >= self.threshold", "probs_TE < self.threshold"),
    Bug("soft combine over tokens", ROUTERS + "soft.py",
        "combine = logits.softmax(dim=-1)", "combine = logits.softmax(dim=1)"),
    Bug("a hash of the neighbour's id", ROUTERS + "hash.py",
        "self.table[ids_T]", "self.table[ids_T.roll(1)]"),
    Bug("negative gates count", ROUTERS + "relu.py",
        "gate_TE = logits_TE.relu()", "gate_TE = logits_TE.abs()"),
    Bug("cosine of any length", ROUTERS + "cosine.py",
        "unit_rows(gate_logits(tokens.x, self.projection.weight))",
        "gate_logits(tokens.x, self.projection.weight)"),
    Bug("no balance in training", ROUTERS + "base_layers.py", "if self.training:", "if False:"),
    Bug("balance in evaluation", ROUTERS + "base_layers.py", "if self.training:", "if True:"),
    Bug("no plan in training", ROUTERS + "sinkhorn.py",
        "if self.training else logits_TE", "if False else logits_TE"),
]  # fmt: skip
