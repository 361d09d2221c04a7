"""Q-RM step by step: from one pair of answers to one PPO update, with every shape printed.

    python classroom/walkthrough.py          all of it, in less than a minute on one core

Or cell by cell: editors that know `# %%` (VS Code, PyCharm, Spyder, Jupyter with jupytext) open this file as
a notebook. Everything here calls the project's own functions; nothing is re-implemented. The order is that of
the data.

B sequences · P pairs (2P rows) · T positions · V vocabulary · D model width
"""

# %%
import copy
import math
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]) if "__file__" in globals() else ".")
import data
from model import (
    LanguageModel,
    ModelConfig,
    ScalarModel,
    at_actions,
    build_model,
    init_weights,
    scatter_to_mask,
    token_logprobs,
)
from parallel import Grid, Optimizer, Update
from ppo import ppo_advantages, ppo_loss, ppo_step, state_values, value_loss
from qrm import (
    bind_reward,
    credit_counts,
    fused_qrm_loss,
    masked_mean,
    qrm_loss,
    reward_model_loss,
    token_scores,
    token_shares,
)
from reinforce import (
    collect_rollout,
    minibatches,
    reinforce_advantages,
    reinforce_loss,
    rollout_stats,
    standardize,
)
from support.evaluate import count_right, flat, make_pairs, sample_graded
from support.settings import Config

torch.set_num_threads(1)
grid = Grid()  # one process: no launcher, no process group
cfg = Config(
    task="arith",
    max_new_tokens=32,
    batch_size=128,
    minibatch=64,
    advantage="token",
    kl_coef=0.1,
    ppo_epochs=2,
)


def section(title):
    print(f"\n{title}")


def table(**columns):
    """Prints columns side by side, one row per index."""

    def show(x):
        if isinstance(x, float):
            return f"{x:+.3f}"
        return repr(x) if isinstance(x, str) else str(x)

    shown = [[name, *map(show, column)] for name, column in columns.items()]
    widths = [max(map(len, column)) for column in shown]
    for row in zip(*shown):
        print("  " + "  ".join(text.rjust(width) for text, width in zip(row, widths)))


# %%
section("1. The task")
# Word problems whose author misreads some verbs. Unlike in real data, the first wrong token of an answer is
# known exactly.
task = data.Arith(steps=(2, 2), verbs=4, misread=2)
rows = data.arith_rows("train", 4000, 0, task)
heldout = data.arith_rows("test", 200, 0, task)
row = next(row for row in rows if row["response"] != row["solution"])
print(f"the author misreads {sorted(task.misreads)} with probability {task.q}")
print(f"prompt     {row['prompt']!r}\nsolution   {row['solution']!r}\nauthor     {row['response']!r}")

# %%
section("2. One pair as ids")
# Prompt and response are encoded apart, so a response's ids never depend on its prompt; the stop token is
# part of the response.
tokenizer = data.arith_tokenizer()
one_pair = {**row, "chosen": row["solution"], "rejected": row["response"]}
((chosen, rejected),), _ = data.encode([one_pair], tokenizer, 64, ("chosen", "rejected"))
print(f"vocabulary: {tokenizer.vocab_size} tokens; stop ids {tokenizer.stop_ids}")
for name, part in (
    ("prompt", chosen.prompt_ids),
    ("chosen", chosen.response_ids),
    ("rejected", rejected.response_ids),
):
    tokens = " ".join(f"{text!r}:{id}" for id, text in zip(part, tokenizer.token_texts(part)))
    print(f"{name:<9}{len(part):>3} ids: {tokens}")
error = data.first_error(rejected.response_ids, chosen.response_ids)
wrong_token = tokenizer.token_texts(rejected.response_ids)[error]
print(f"the first wrong token of the rejected answer: number {error}, {wrong_token!r}")

# %%
section("3. The shift and the mask")
# The model reads `inputs = ids[:, :-1]` and predicts `targets = ids[:, 1:]`: index t is the state s_t =
# inputs[:, :t+1] and the action a_t = targets[:, t]. The shift happens once, in collate; scores,
# log-probabilities, values and rewards all live at t.
ids, mask = data.collate([chosen, rejected])
inputs, targets = ids[:, :-1], ids[:, 1:]
print(
    f"ids {tuple(ids.shape)} int64 = (2P, T+1); inputs, targets, response_mask {tuple(mask.shape)} = (2P, T)"
)
first = len(chosen.prompt_ids) - 3  # from the last positions of the prompt on
table(
    t=list(range(mask.shape[1]))[first:],
    inputs=tokenizer.token_texts(inputs[1, first:].tolist()),
    targets=tokenizer.token_texts(targets[1, first:].tolist()),
    mask=["x" if inside else "." for inside in mask[1, first:]],
)

# %%
section("4. A policy")
# A LLaMA decoder from scratch. Untrained it knows nothing: its entropy is near that of an even choice.
shape = ModelConfig(
    tokenizer.vocab_size,
    hidden_size=48,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
policy = init_weights(build_model(LanguageModel, shape, grid), seed=0)
x = policy.model(inputs)  # (2P, T, D), the residual stream
logits = policy.logits(x)  # (2P, T, V)
logprobs, entropy = token_logprobs(policy, ids, mask)  # (2P, T) each
named = list(policy.named_parameters())
print(f"{sum(param.numel() for _, param in named):,} parameters in {len(named)} tensors, e.g.")
for name, param in named[:6]:
    print(f"  {name:<44}{tuple(param.shape)}")
print(f"residual stream {tuple(x.shape)}, logits {tuple(logits.shape)}", end=", ")
print(f"logprobs and entropy {tuple(logprobs.shape)}")
print(f"mean entropy in the response {entropy[mask].mean():.2f} nats", end="; ")
print(f"an even choice among {tokenizer.vocab_size} has {math.log(tokenizer.vocab_size):.2f}")

# %%
section("5. Supervised fine-tuning on the author's answers")
# The loss is -log pi(a_t | s_t), averaged over response tokens. The policy learns to calculate, and the
# author's mistakes with it.
examples = [example for (example,) in data.encode(rows, tokenizer, 64)[0]]


def train(model, batches, weigh, loss_fn, lr, show):
    """One update per batch with a warm-up and a linear decay; prints every `show`-th."""
    optimizer = Optimizer(model, grid, lr)
    for step, batch in enumerate(batches):
        update = Update(optimizer, [(weigh(batch), batch)])
        for part in update:
            update.backward(*loss_fn(part))
        stats = update.step(lr * min(1, (step + 1) / 20) * (1 - 0.95 * step / len(batches)))
        if step % show == 0 or step == len(batches) - 1:
            print(f"  update {step:>3}  " + "  ".join(f"{k} {v:.4f}" for k, v in stats.items()))


def sft_loss(batch):
    ids, mask = data.collate(batch)
    logprobs, entropy = token_logprobs(policy, ids, mask)
    return -logprobs.sum() / mask.sum(), {"entropy": (entropy.sum() / mask.sum()).item()}


def response_tokens(batch):
    return sum(len(example.response_ids) for example in batch)


def batches_of(items, batch_size, steps):
    return [[items[i] for i in data.batch_indices(len(items), batch_size, step, 0)] for step in range(steps)]


train(policy, batches_of(examples, 64, 220), response_tokens, sft_loss, 5e-3, 40)

# %%
section("6. What it writes")
# Ids in, ids out. Greedily it is wrong where the author usually is; sampled it is sometimes right, so there
# is something to reinforce.


def solved(policy, k=1, temperature=0.0):
    """The share of right answers among k to each held-out prompt."""
    answers = sample_graded(policy, tokenizer, heldout, cfg, 0, temperature, k)
    return count_right(flat(answers)) / len(heldout) / k


# Four samples per prompt.
answers = sample_graded(policy, tokenizer, rows[:1000], cfg, 1, 1.0, 4)
print(f"held-out prompts solved: greedily {solved(policy):.2f}, by one sample {solved(policy, 4, 1.0):.2f}")
mixed = next(i for i, four in enumerate(answers) if 0 < count_right(four) < 4)
print(repr(rows[mixed]["prompt"]))
for answer in answers[mixed]:
    print(f"  {'right' if answer.correct else 'wrong'}  {len(answer.ids):>2} tokens  {answer.text!r}")

# %%
section("7. Preference pairs")
# Right answers paired with wrong ones of the same prompt. The reward model is never told which token is
# wrong.
found = [(row, pair) for row, four in zip(rows, answers) for pair in make_pairs(row, four, 4, tokenizer)]
pairs = data.encode([{**row, **pair} for row, pair in found], tokenizer, 64, ("chosen", "rejected"))[0]
cut = len(pairs) * 4 // 5
while found[cut][0] is found[cut - 1][0]:  # no prompt on both sides
    cut += 1
pairs, test_pairs = pairs[:cut], pairs[cut:]
print(f"{len(found)} pairs from {len(answers)} prompts", end="; ")
print(f"{len(pairs)} to learn from, {len(test_pairs)} held out. One of them:")
for key in ("prompt", "chosen", "rejected"):
    print(f"  {key} {found[0][1][key]!r}")

# %%
section("8. The reward model before training")
# The policy's weights with a scalar head of zeros: every token scores 0, both means are equal, and the loss
# is log(1 + e^2).
reward_model = build_model(ScalarModel, shape, grid)
reward_model.model.load_state_dict(policy.model.state_dict())
torch.nn.init.zeros_(reward_model.score.weight)
ids, mask = data.collate([example for pair in pairs[:2] for example in pair])  # rows 2p and 2p+1 are pair p
scores = token_scores(reward_model, ids)
loss, stats = qrm_loss(scores, mask, beta=0.2, margin=2.0)
means = masked_mean(scores, mask)  # (2P,)
print(
    f"ids {tuple(ids.shape)} -> scores {tuple(scores.shape)} -> means {tuple(means.shape)} -> loss {loss:.4f}"
)

# %%
section("9. The same loss, fused")
# Norm, head, mean and loss in one function with a closed-form gradient, on the response tokens alone,
# concatenated. It keeps two numbers per token instead of a copy of the hidden states; a token's share is 1/N
# in the chosen answer, -1/M in the rejected one.
torch.nn.init.normal_(reward_model.score.weight, generator=torch.Generator().manual_seed(0))
norm = reward_model.model.norm
x = at_actions(reward_model, ids, mask).detach()  # (n, D), after each a_t has been read
shares, of_pair = token_shares(mask)  # (n,) each
by_autograd, by_hand = (x.clone().requires_grad_() for _ in range(2))
plain = qrm_loss(scatter_to_mask(mask, reward_model.scalars(by_autograd)), mask)[0]
fused, gaps = fused_qrm_loss(
    by_hand, norm.weight, reward_model.score.weight, shares, of_pair, 2, eps=norm.eps
)
plain.backward()
fused.backward()
print(f"residual stream {tuple(x.shape)}, shares {tuple(shares.shape)}, gaps {tuple(gaps.shape)}")
print(
    f"loss {plain:.6f} (plain), {fused:.6f} (fused); largest gradient {by_autograd.grad.abs().max():.2e}, "
    f"largest difference {(by_autograd.grad - by_hand.grad).abs().max():.1e}"
)
reward_model.zero_grad()
torch.nn.init.zeros_(reward_model.score.weight)

# %%
section("10. Training it")
# Watch the loss leave 2.1269. It is log 2 only when the means differ by margin / beta = 10.


def rm_loss(batch):
    ids, mask = data.collate([example for pair in batch for example in pair])
    return reward_model_loss(reward_model, ids, mask, cfg)


train(reward_model, batches_of(pairs, 32, 100), len, rm_loss, 2e-3, 20)

# %%
section("11. What it has learned: credit for tokens")
# The first held-out pair with a right answer on the right path, and an error after the first line. The loss
# only ever saw means, but the score falls where the answer goes wrong. (A tiny model after 100 updates is
# noisy: some right tokens score low.)


def first_wrong(example):
    """Index of the first wrong token; the length of the answer if all are right."""
    prompt = tokenizer.decode(example.prompt_ids[1:])  # without BOS
    return data.error_places(tokenizer, prompt, [example])[0]


def is_clear(pair):
    """Whether a pair shows the point: equally long, the right answer without an error, the wrong one with a
    late one.
    """
    right, wrong = pair
    n = len(right.response_ids)
    return first_wrong(right) == n == len(wrong.response_ids) and first_wrong(wrong) > 6


chosen, rejected = next(pair for pair in test_pairs if is_clear(pair))
ids, mask = data.collate([chosen, rejected])
with torch.no_grad():
    scores = token_scores(reward_model, ids)
error = first_wrong(rejected)
print(repr(tokenizer.decode(chosen.prompt_ids)))
table(
    right=tokenizer.token_texts(chosen.response_ids),
    Z_right=scores[0][mask[0]].tolist(),
    wrong=tokenizer.token_texts(rejected.response_ids),
    Z_wrong=scores[1][mask[1]].tolist(),
    first_wrong=["<-" if i == error else "" for i in range(len(rejected.response_ids))],
)
print("means {:+.3f} and {:+.3f}".format(*masked_mean(scores, mask).tolist()))

# %%
section("12. How good is it?")
# Pairs in the right order, and whether the score finds the place: P(Z at the first wrong token < Z before
# it); minus the index scores 1, so the choice below says more.
ids, mask = data.collate([example for pair in test_pairs for example in pair])
with torch.no_grad():
    scores = token_scores(reward_model, ids)
_, stats = qrm_loss(scores, mask)
wrong = [z[m] for z, m in zip(scores[1::2], mask[1::2])]
counts = credit_counts(wrong, [first_wrong(rejected) for _, rejected in test_pairs])
auc = counts["wins"] / counts["comparisons"]
print(f"{len(test_pairs)} held-out pairs, scores {tuple(scores.shape)}: ", end="")
print(f"pair accuracy {stats['pair_accuracy']:.3f}, AUC of the first wrong token {auc:.3f}")

# %%
section("13. A rollout")
# The policy samples, the reward model scores every sampled token (as ids, never as text again), and the
# policy's log-probabilities are kept as `old_logprobs`. At the start the policy is its own reference, so both
# KL estimates are 0.
reference = copy.deepcopy(policy).requires_grad_(False)
reward = bind_reward("qrm", reward_model.requires_grad_(False))
prompts = [tokenizer.encode_prompt(row["prompt"]) for row in random.Random(0).sample(rows, cfg.batch_size)]
rollout = collect_rollout(policy, reference, reward, prompts, tokenizer.stop_ids, cfg, seed=7)
for name, value in vars(rollout).items():
    print(f"  {name:<14}{str(tuple(value.shape)):<12}{str(value.dtype).removeprefix('torch.')}")
print("  " + "  ".join(f"{k} {v:.3f}" for k, v in rollout_stats(rollout, grid).items()))
mask = rollout.response_mask

# %%
section("14. Z_std: from scores to rewards")
# Mean and standard deviation over all response tokens of the rollout. The score is taken as a Q: no discount,
# no sum over later rewards.
z_std = standardize(rollout.scores, rollout.reward_mask, "mean_std", grid)  # (B, T)


def mean_and_std(values):
    return f"mean {values.mean():+.3f}  std {values.std(unbiased=False):.3f}"


print(f"Z      {mean_and_std(rollout.scores[mask])}  of {mask.sum()} tokens")
print(f"Z_std  {mean_and_std(z_std[mask])}  outside the mask all {z_std[~mask].abs().max():.0f}")

# %%
section("15. Advantages, without a critic")
# A_t = Z_std - kl_coef * KL_t. One sampled answer, token by token:
A = reinforce_advantages(rollout, cfg, grid)  # (B, T)
i = z_std.min(1).values.argmin().item()  # the answer with the lowest token score
m, response = mask[i], rollout.ids[i, 1:][mask[i]].tolist()
print(repr(tokenizer.decode(rollout.ids[i, : m.nonzero()[0] + 1].tolist())))
table(
    token=tokenizer.token_texts(response),
    logprob=rollout.old_logprobs[i][m].tolist(),
    entropy=rollout.entropy[i][m].tolist(),
    Z=rollout.scores[i][m].tolist(),
    Z_std=z_std[i][m].tolist(),
    KL=rollout.kl_k1[i][m].tolist(),
    A=A[i][m].tolist(),
)

# %%
section("16. The policy gradient")
# REINFORCE: -mean of A_t log pi(a_t | s_t). A small step along it raises the log-probability of tokens with A
# > 0 against the others.
student = copy.deepcopy(policy)
before, _ = token_logprobs(student, rollout.ids, mask)
loss, _ = reinforce_loss(before, A, mask)
loss.backward()
with torch.no_grad():
    for param in student.parameters():
        param -= 0.01 * param.grad
    change = token_logprobs(student, rollout.ids, mask)[0] - before
up, down = change[mask & (A > 0)].mean(), change[mask & (A < 0)].mean()
print(f"loss {loss:.4f}; mean change of log pi where A > 0: {up:+.5f}, where A < 0: {down:+.5f}")

# %%
section("17. The critic")
# V(s_t) is read at inputs[:, t], before the action is seen. Flip the first sign of the answer above: V(s_t)
# must not change, the score Z(s_t, a_t) must.
critic = copy.deepcopy(reward_model).requires_grad_(True)  # it starts from the reward model
t = m.nonzero()[1].item()
plus, minus = tokenizer.encode("+-")
own, other = rollout.ids[i : i + 1], rollout.ids[i : i + 1].clone()
other[0, t + 1] = plus if own[0, t + 1] == minus else minus  # another a_t = targets[0, t]
sign, flipped = (tokenizer.decode([ids[0, t + 1].item()]) for ids in (own, other))
with torch.no_grad():
    v, v_flipped = (state_values(critic, ids, mask[i : i + 1])[0, t] for ids in (own, other))
    z, z_flipped = (token_scores(reward_model, ids)[0, t] for ids in (own, other))
print(f"read at s_t {v:+.4f} with {sign!r}, {v_flipped:+.4f} with {flipped!r}")
print(f"Z(s_t, a_t) {z:+.4f} with {sign!r}, {z_flipped:+.4f} with {flipped!r}")
torch.nn.init.zeros_(critic.score.weight)  # and gets a new head
values = state_values(critic, rollout.ids, mask).detach()  # (B, T)
print(f"values {tuple(values.shape)}, all {values.abs().max():.0f} before it has learned")

# %%
section("18. PPO's advantages")
# A = Z_std - kl_coef * KL - V, and the critic's target is Z_std (Algorithm 1 of the paper). With V = 0 it is
# REINFORCE's advantage.
A, value_targets = ppo_advantages(rollout, values, cfg, grid)  # (B, T) each
difference = (A - reinforce_advantages(rollout, cfg, grid)).abs().max()
print(f"largest difference from REINFORCE's advantage: {difference:.0f}")
loss, _ = value_loss(values, value_targets, mask)
print(f"the critic's loss: {loss:.4f} (targets of variance 1, predicted as 0)")

# %%
section("19. The ratio starts at 1")
# rho_t = pi(a_t | s_t) / pi_old(a_t | s_t). The rollout's log-probabilities come from the same forward as
# those of training, in the same micro-batches, so at the first minibatch the ratio is exactly 1, and PPO's
# gradient is REINFORCE's.
start, stop = minibatches(rollout.lengths(), cfg)[0][0]  # the first micro-batch of the first minibatch
chunk = rollout.rows(start, stop)
weight = A[start:stop, : chunk.response_mask.shape[1]]
logprobs, _ = token_logprobs(policy, chunk.ids, chunk.response_mask, cfg.temperature)
ratio = (logprobs - chunk.old_logprobs)[chunk.response_mask].exp()
loss, stats = ppo_loss(logprobs, chunk.old_logprobs, weight, chunk.response_mask, cfg.clip)
params = list(policy.parameters())
ppo_gradient = torch.autograd.grad(loss, params, retain_graph=True)
reinforce_gradient = torch.autograd.grad(reinforce_loss(logprobs, weight, chunk.response_mask)[0], params)
difference = max((a - b).abs().max().item() for a, b in zip(ppo_gradient, reinforce_gradient))
largest = max(g.abs().max() for g in ppo_gradient)
print(f"ratio of {len(ratio)} tokens: from {ratio.min():.6f} to {ratio.max():.6f}", end="; ")
print(f"loss {loss:.4f}, clip_frac {stats['clip_frac']:.1f}")
print(f"largest difference between the two gradients: {difference:.1e} (their largest entry: {largest:.1e})")

# %%
section("20. The PPO update")
# Two passes over the rollout, two minibatches each. Afterwards some ratios have left 1 +- clip, and there is
# a KL to the reference. (explained_variance is that of the values the update began with, and they were all
# 0.)
optimizer, critic_optimizer = Optimizer(policy, grid, 4e-4), Optimizer(critic, grid, 2e-3)
greedy_before, sampled_before = solved(policy), solved(policy, 4, 1.0)
stats = ppo_step(policy, critic, optimizer, critic_optimizer, rollout, cfg, 4e-4, 2e-3)
print("  " + "  ".join(f"{k} {v:.4f}" for k, v in stats.items()))
with torch.no_grad():
    after, _ = token_logprobs(policy, rollout.ids, mask)
    ratio = (after - rollout.old_logprobs)[mask].exp()
outside = ((ratio - 1).abs() > cfg.clip).float().mean()
print(f"ratio now: from {ratio.min():.3f} to {ratio.max():.3f}, {outside:.1%} outside 1 +- {cfg.clip}")

# %%
section("21. Did it help?")
# The same prompts again, by the updated policy. (Real runs do this a dozen times or more: `python train.py`.)
second = collect_rollout(policy, reference, reward, prompts, tokenizer.stop_ids, cfg, seed=8)
before, after = rollout_stats(rollout, grid), rollout_stats(second, grid)
print(f"mean Z {before['reward']:+.3f} -> {after['reward']:+.3f}", end="; ")
print(f"KL to the reference {after['kl_k1']:.4f} (k1), {after['kl_k3']:.4f} (k3) nats per token")
greedy, sampled = solved(policy), solved(policy, 4, 1.0)
print(f"held-out prompts solved: greedily {greedy_before:.2f} -> {greedy:.2f}", end=", ")
print(f"by one sample {sampled_before:.2f} -> {sampled:.2f}")
print("next: python classroom/exercises.py list")
