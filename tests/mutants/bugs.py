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


_GATED = "weight_N = weight_N[order.pair]"
_SWITCH_LOGITS = "return gate_logits(x_TD, self.classifier.weight, self.classifier.bias)"
_JITTERED = f"""x_TD = jittered(x_TD, self.jitter)
        {_SWITCH_LOGITS}"""
_ADDED = """noise = x_TD.new_empty(x_TD.shape[0], self.num_experts)
            noise.uniform_(-self.jitter, self.jitter)
            return gate_logits(x_TD, self.classifier.weight, self.classifier.bias) + noise
        return gate_logits(x_TD, self.classifier.weight, self.classifier.bias)"""
_KEEP = "return replace(assignment, kept=assignment.kept & (queue_positions(assignment) < limit))"
_COMBINED = "y_TD = combine(self.experts(slots.x, slots.counts), routing.assignment, order)"
_PASSED_ON = f"""{_COMBINED}
            y_TD = torch.where((y_TD == 0).all(-1, keepdim=True), 0.5 * tokens.x, y_TD)"""

_BFLOAT16 = """weights = tuple(w.bfloat16() for w in (*inner, self.wo))
        y = grouped_mlp(slots.bfloat16(), counts, weights[:-1], weights[-1],
                        function=self.function, p=p)
        return y.to(slots.dtype)"""
_RECAST = """self.classifier.weight.data = self.classifier.weight.data.double()
        return gate_logits(x_TD, self.classifier.weight, self.classifier.bias).float()"""
_EMPTY_LOAD = "    if num_tokens == 0:\n        return probs_TE.sum()\n"
_FROM_LAYER_ONE = """if len(routing) == 4:
            return {name: routing[0].logits.new_zeros(()) for name in self.losses}
        return {"""

_REDRAWN = """    for child in model.children():
        redraw(child)
    for name, parameter in model.named_parameters():
        if ".router." in name and parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
"""

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
        "return choice_TE.detach().max(dim=-1, keepdim=True).indices",
        "return choice_TE.shape[1] - 1 - choice_TE.flip(-1).argmax(dim=-1, keepdim=True)"),
    Bug("ties among many experts go to the last window", FUNCTIONS + "assign.py",
        "window_T = most_TW.max(-1).indices",
        "window_T = most_TW.shape[1] - 1 - most_TW.flip(-1).max(-1).indices"),
    Bug("a window forgets that its best expert is taken", FUNCTIONS + "assign.py",
        "most_TW.scatter_(1, window_T[:, None], rest_T[:, None])", "rest_T"),
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
        "x_TD.index_select(0, order.token)", "x_TD.index_select(0, a.token)"),
    Bug("weights in pair order", FUNCTIONS + "dispatch.py", _GATED, "weight_N = weight_N"),
    Bug("the gate never weighs the output", FUNCTIONS + "dispatch.py",
        "weighted_ND = y_ND * weight_N.unsqueeze(-1).to(y_ND.dtype)", "weighted_ND = y_ND * 1.0"),
    Bug("mean instead of sum over a token's experts", FUNCTIONS + "dispatch.py",
        "y_ND.shape[1]).sum(1)", "y_ND.shape[1]).mean(1)"),
    Bug("rows added to other tokens", FUNCTIONS + "dispatch.py",
        "index_add(0, order.token, weighted_ND)", "index_add(0, a.token, weighted_ND)"),
    Bug("one choice's weights in row order", FUNCTIONS + "dispatch.py",
        "weight_T = weight_N if a.rank_major", "weight_T = weight_N[order.pair] if a.rank_major"),
    Bug("rows of a token taken side by side", FUNCTIONS + "dispatch.py",
        "row_N.view(a.choices, a.num_tokens).t()", "row_N.view(a.num_tokens, a.choices)"),
    Bug("reordered pairs still called rank-major", FUNCTIONS + "queues.py",
        "choices=a.choices,", "choices=a.choices, rank_major=a.rank_major,"),
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
    Bug("one capacity whatever the length", POLICIES + "limits.py",
        "return max(_ceil(f * s * k / e), 1)", "return 64", historic=True),
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
    Bug("no gradient for a module without rows", "moezoo/experts/modules.py",
        "out = self.expert(index)(part)", "out = self.expert(index)(part) if len(part) else part",
        historic=True),
    Bug("no gradient for stacked experts without rows", FUNCTIONS + "grouped_mlp.py",
        "stacked_gradient(weight.shape, weight, hit) if want else None",
        "stacked_gradient(weight.shape, weight, hit) if want and hit else None"),
    Bug("the gradient of an idle expert is what memory held", "moezoo/ops/memory.py",
        "stacked[number].zero_()", "stacked[number].fill_(0.5)"),
    Bug("the gate of gated experts is left out", "moezoo/experts/stacked.py",
        "return (self.wi_0, self.wi_1) if self.gated", "return (self.wi_0,) if self.gated",
        historic=True),
    Bug("experts compute in bfloat16 whatever the model's dtype", "moezoo/experts/stacked.py",
        "return grouped_mlp(slots, counts, inner, self.wo, function=self.function, p=p)",
        _BFLOAT16, historic=True, quick=True),
    Bug("forward gives a parameter another dtype", ROUTERS + "switch.py", _SWITCH_LOGITS, _RECAST,
        historic=True),
    Bug("an empty batch has no busiest queue", FUNCTIONS + "queues.py",
        "count_Q = torch.zeros(num_keys,", "count_Q = torch.zeros(int(key_N.max()) + 1,",
        historic=True),
    Bug("the mean over no token is NaN", FUNCTIONS + "losses.py",
        "value_T.sum() / max(value_T.numel(), 1)", "value_T.sum() / value_T.numel()",
        historic=True),
    Bug("load balance divides an empty batch into groups", FUNCTIONS + "losses.py",
        _EMPTY_LOAD, ""),
    Bug("a negative capacity is accepted", POLICIES + "limits.py",
        "or limit < 1:", "or limit == 0:", historic=True),
    Bug("input must be contiguous", "moezoo/layer.py",
        "x_TD = x.reshape(-1, x.shape[-1])", "x_TD = x.view(-1, x.shape[-1])", historic=True),
    Bug("more slots than tokens fail", FUNCTIONS + "top_tokens.py",
        "return min(max(math.ceil(exact - 1e-9 * max(exact, 1.0)), 1), num_tokens)",
        "return max(math.ceil(exact - 1e-9 * max(exact, 1.0)), 1)", historic=True),
    Bug("capacity is ignored outside training", POLICIES + "random_order.py",
        "if limit >= assignment.group_size:",
        "if limit >= assignment.group_size or not self.training:", historic=True),
    Bug("recomputation is recorded again", "moezoo/recording.py",
        "if torch._C._current_graph_task_id() == -1:", "if True:", historic=True),
    Bug("a loss is summed over calls", "moezoo/recording.py",
        "total = weight * torch.stack(values).mean()",
        "total = weight * torch.stack(values).sum()"),
    Bug("a loss counts its last call twice", "moezoo/recording.py",
        "torch.stack(values).mean() +", "torch.stack([*values, values[-1]]).mean() +",
        historic=True),
    Bug("a list of calls that outlives its block", "moezoo/recording.py",
        "tape = Tape(layers)", 'tape = Tape(layers, record.__dict__.setdefault("calls", {}))',
        historic=True, quick=True),
    Bug("hooks stay after the block", "moezoo/recording.py", "handle.remove()", "pass"),
    Bug("a loss without gradient is accepted", "moezoo/recording.py",
        "        self._check_gradient()\n", "", historic=True),
    Bug("statistics count padding", FUNCTIONS + "statistics.py",
        "return int(routing.real.sum())", "return routing.real.numel()", historic=True),
    Bug("the share of drops is of all places", FUNCTIONS + "statistics.py",
        "dropped=1.0 - float(computed.sum()) / total if",
        "dropped=1.0 - float(routings[0].assignment.num_tokens) / total if", historic=True),
    Bug("drops in evaluation, where a cache sees shorter queues", POLICIES + "switch.py",
        "            return None\n", "            return super().limit(routing)\n", historic=True),
    Bug("no losses when every layer is sparse", "moezoo/models/losses.py",
        "return {\n            name: torch", f"{_FROM_LAYER_ONE}\n            name: torch",
        historic=True),
    Bug("labels that ask for nothing give NaN", "moezoo/models/switch.py",
        "total / (targets != IGNORED).sum().clamp(min=1)", "total / (targets != IGNORED).sum()",
        historic=True),
    Bug("balancing buffers are cast with the model", "moezoo/component.py",
        "self._buffers[name] = buffer.to(after.device, torch.float32)", "pass",
        historic=True, quick=True),
    Bug("a state dict in half precision takes balancing buffers along", "moezoo/component.py",
        "elif tensor is not None and _is_half(tensor):", "elif None:", historic=True),
    Bug("resetting forgets what is below", "moezoo/component.py",
        "            redraw(child)\n        self.reset_own()",
        "            pass\n        self.reset_own()"),
    Bug("loading rounds balancing buffers", "adapters/checkpoint.py",
        "cast=name not in buffers", "cast=True", historic=True),
    Bug("thresholds keep what their memory held", ROUTERS + "expert_threshold.py",
        "        self.threshold.fill_(1.0 / self.num_experts)\n", "", historic=True),
    Bug("a model draws its noise gates anew", "moezoo/models/initialize.py",
        "    for child in model.children():\n        redraw(child)\n", _REDRAWN, historic=True),
    Bug("sigmoid gates without a gradient", ROUTERS + "sigmoid_top_k.py",
        "chosen_TK = log_score_TE.gather(1, expert_TK)",
        "chosen_TK = log_score_TE.detach().gather(1, expert_TK)"),
    Bug("the gradient of soft slots has another sign", ROUTERS + "soft.py",
        "self.phi.to(dtype)", "(2.0 * self.phi.detach() - self.phi).to(dtype)"),
    Bug("BASE seats tokens on the default device", ROUTERS + "base_layers.py",
        'dtype=torch.int64, device="cpu")', "dtype=torch.int64)", historic=True),
]  # fmt: skip
