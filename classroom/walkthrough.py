"""Q-RM step by step: from one pair of answers to one PPO update, with every shape printed.

    python classroom/walkthrough.py          all of it, in less than a minute on one core

Or cell by cell: editors that know `# %%` (VS Code, PyCharm, Spyder, Jupyter with jupytext) open this file as a notebook.
Everything here calls the project's own functions; nothing is re-implemented. The order is that of the data.

B sequences · P pairs (2P rows) · T positions · V vocabulary · D model width
"""

# %%
import copy
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
from support.evaluate import make_pairs, sample_graded
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
    """Prints columns side by side, one row an index."""
    shown = {
        name: [
            f"{x:+.3f}" if isinstance(x, float) else repr(x) if isinstance(x, str) else str(x) for x in column
        ]
        for name, column in columns.items()
    }
    widths = {name: max(len(name), *map(len, column)) for name, column in shown.items()}
    for row in [list(shown), *zip(*shown.values())]:
        print("  " + "  ".join(text.rjust(width) for text, width in zip(row, widths.values())))


# %%
section("1. The task")
# Word problems whose author misreads some verbs. Unlike in real data, the first wrong token of an answer is known exactly.
task = data.Arith(steps=(2, 2), verbs=4, misread=2)
rows, heldout = data.arith_rows("train", 4000, 0, task), data.arith_rows("test", 200, 0, task)
row = next(row for row in rows if row["response"] != row["solution"])
print(f"the author misreads {sorted(task.misreads)} with probability {task.q}")
print(f"prompt     {row['prompt']!r}\nsolution   {row['solution']!r}\nauthor     {row['response']!r}")

# %%
section("2. One pair as ids")
# Prompt and response are encoded apart, so a response's ids never depend on its prompt; the stop token is part of the response.
tokenizer = data.arith_tokenizer()
((chosen, rejected),), _ = data.encode(
    [{**row, "chosen": row["solution"], "rejected": row["response"]}], tokenizer, 64, ("chosen", "rejected")
)
print(f"vocabulary: {tokenizer.vocab_size} tokens; stop ids {tokenizer.stop_ids}")
for name, part in (
    ("prompt", chosen.prompt_ids),
    ("chosen", chosen.response_ids),
    ("rejected", rejected.response_ids),
):
    print(
        f"{name:<9}{len(part):>3} ids: "
        + " ".join(f"{text!r}:{id}" for id, text in zip(part, tokenizer.token_texts(part)))
    )
error = data.first_error(rejected.response_ids, chosen.response_ids)
print(
    f"the first wrong token of the rejected answer: number {error}, {tokenizer.token_texts(rejected.response_ids)[error]!r}"
)

# %%
section("3. The shift and the mask")
# `inputs = ids[:, :-1]` is what the model has read, `targets = ids[:, 1:]` what came next: index t is the state s_t = inputs[:, :t+1]
# and the action a_t = targets[:, t]. This happens once, in collate; scores, log-probabilities, values and rewards all live at t.
ids, mask = data.collate([chosen, rejected])
inputs, targets = ids[:, :-1], ids[:, 1:]
print(
    f"ids {tuple(ids.shape)} int64 = (2P, T+1); inputs, targets and response_mask {tuple(mask.shape)} = (2P, T)"
)
first = len(chosen.prompt_ids) - 3  # the last positions of the prompt, and on
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
print(
    f"{sum(p.numel() for p in policy.parameters()):,} parameters in {len(list(policy.parameters()))} tensors, e.g."
)
for name, param in list(policy.named_parameters())[:6]:
    print(f"  {name:<44}{tuple(param.shape)}")
print(
    f"residual stream {tuple(x.shape)}, logits {tuple(logits.shape)}, logprobs and entropy {tuple(logprobs.shape)}"
)
print(
    f"mean entropy in the response {entropy[mask].mean():.2f} nats; an even choice among {tokenizer.vocab_size} has {torch.tensor(float(tokenizer.vocab_size)).log():.2f}"
)

# %%
section("5. Supervised fine-tuning on the author's answers")
# The loss is -log pi(a_t | s_t), averaged over response tokens. The policy learns to calculate, and the author's mistakes with it.
examples = [example for (example,) in data.encode(rows, tokenizer, 64)[0]]


def train(model, batches, weigh, loss_fn, lr, show):
    """One update a batch with a warm-up and a linear decay; prints every `show`-th."""
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


batches = [[examples[i] for i in data.batch_indices(len(examples), 64, step, 0)] for step in range(220)]
train(policy, batches, lambda batch: sum(len(e.response_ids) for e in batch), sft_loss, 5e-3, 40)

# %%
section("6. What it writes")
# Ids in, ids out. Greedily it is wrong where the author usually is; sampled it is sometimes right, so there is something to find.


def solved(policy, k=1, temperature=0.0):
    return (
        sum(
            right
            for answers in sample_graded(policy, tokenizer, heldout, cfg, grid, 0, temperature, k)[0]
            for _, _, right, _ in answers
        )
        / len(heldout)
        / k
    )


answers = sample_graded(policy, tokenizer, rows[:1000], cfg, grid, 1, 1.0, 4)[
    0
]  # four samples a prompt: (text, ids, right?, cut off?)
print(f"held-out prompts solved: greedily {solved(policy):.2f}, by one sample {solved(policy, 4, 1.0):.2f}")
some = next(i for i, four in enumerate(answers) if len({right for *_, right, _ in four}) == 2)
print(repr(rows[some]["prompt"]))
for text, response, right, cut in answers[some]:
    print(f"  {'right' if right else 'wrong'}  {len(response):>2} tokens  {text!r}")

# %%
section("7. Preference pairs")
# Right answers paired with wrong ones of the same prompt. Which token is wrong, nobody tells the reward model.
found = [(row, pair) for row, four in zip(rows, answers) for pair in make_pairs(row, four, 4)]
pairs = data.encode([{**row, **pair} for row, pair in found], tokenizer, 64, ("chosen", "rejected"))[0]
cut = next(
    i for i in range(len(pairs) * 4 // 5, len(pairs)) if found[i][0] is not found[i - 1][0]
)  # no prompt on both sides
pairs, test_pairs = pairs[:cut], pairs[cut:]
print(
    f"{len(found)} pairs from {len(answers)} prompts; {len(pairs)} to learn from, {len(test_pairs)} held out. One of them:"
)
print(
    f"  prompt {found[0][1]['prompt']!r}\n  chosen {found[0][1]['chosen']!r}\n  rejected {found[0][1]['rejected']!r}"
)

# %%
section("8. The reward model before training")
# The policy's weights with a scalar head of zeros: every token scores 0, both means are equal, and the loss is log(1 + e^2).
reward_model = build_model(ScalarModel, shape, grid)
reward_model.model.load_state_dict(policy.model.state_dict())
torch.nn.init.zeros_(reward_model.score.weight)
ids, mask = data.collate([example for pair in pairs[:2] for example in pair])  # rows 2p and 2p+1 are pair p
scores = token_scores(reward_model, ids)
loss, stats = qrm_loss(scores, mask, beta=0.2, margin=2.0)
print(
    f"ids {tuple(ids.shape)} -> scores {tuple(scores.shape)} -> means {tuple(masked_mean(scores, mask).shape)} -> loss {loss:.4f}"
)

# %%
section("9. The same loss, fused")
# Norm, head, mean and loss in one function with a closed-form gradient, on the response tokens alone, one behind another. Two
# numbers a token are kept, not a copy of the hidden states; a token's share is 1/N in the chosen answer, -1/M in the rejected one.
torch.nn.init.normal_(reward_model.score.weight, generator=torch.Generator().manual_seed(0))
norm, x = (
    reward_model.model.norm,
    at_actions(reward_model, ids, mask).detach(),
)  # (n, D), where each a_t has been read
shares, of_pair = token_shares(mask)  # (n,) each
by_autograd, by_hand = (x.clone().requires_grad_() for _ in range(2))
plain = qrm_loss(scatter_to_mask(mask, reward_model.scalars(by_autograd)), mask)[0]
fused, gaps = fused_qrm_loss(
    by_hand, norm.weight, reward_model.score.weight, shares, of_pair, 2, eps=norm.eps
)
plain.backward(), fused.backward()
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


batches = [[pairs[i] for i in data.batch_indices(len(pairs), 32, step, 0)] for step in range(100)]
train(reward_model, batches, len, rm_loss, 2e-3, 20)

# %%
section("11. What it has learned: credit for tokens")
# The first held-out pair with a right answer on the right path, and an error behind the first line. The loss only ever saw
# means, but the score falls where the answer goes wrong. (A tiny model after 100 updates is noisy: some right tokens score low.)


def first_wrong(example):
    """Index of the first wrong token; the length of the answer when nothing is wrong."""
    return data.error_places(tokenizer, tokenizer.decode(example.prompt_ids[1:]), [example])[0]  # without BOS


with torch.no_grad():
    shown = (
        pair
        for pair in test_pairs
        if first_wrong(pair[0]) == len(pair[0].response_ids) == len(pair[1].response_ids)
    )
    chosen, rejected = next(pair for pair in shown if first_wrong(pair[1]) > 6)
    ids, mask = data.collate([chosen, rejected])
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
# Pairs in the right order, and whether the score knows the place: P(Z at the first wrong token < Z before it); 0.5 is blind.
with torch.no_grad():
    ids, mask = data.collate([example for pair in test_pairs for example in pair])
    scores = token_scores(reward_model, ids)
_, stats = qrm_loss(scores, mask)
wrong = [z[m] for z, m in zip(scores[1::2], mask[1::2])]
counts = credit_counts(wrong, [first_wrong(rejected) for _, rejected in test_pairs])
print(
    f"{len(test_pairs)} held-out pairs, scores {tuple(scores.shape)}: pair accuracy {stats['pair_accuracy']:.3f}, "
    f"AUC of the first wrong token {counts['wins'] / counts['comparisons']:.3f}"
)

# %%
section("13. A rollout")
# The policy samples, the reward model scores every token of what was sampled (ids, never text again), and the policy's
# log-probabilities are kept as `old_logprobs`. At the start the policy is its own reference, so both KL estimates are 0.
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
# Mean and standard deviation over all response tokens of the rollout. The score is taken as a Q: no discount, no sum over later rewards.
z_std = standardize(rollout.scores, rollout.reward_mask, "mean_std", grid)  # (B, T)
print(
    f"Z      mean {rollout.scores[mask].mean():+.3f}  std {rollout.scores[mask].std(unbiased=False):.3f}  of {mask.sum()} tokens"
)
print(
    f"Z_std  mean {z_std[mask].mean():+.3f}  std {z_std[mask].std(unbiased=False):.3f}  outside the mask all {z_std[~mask].abs().max():.0f}"
)

# %%
section("15. Advantages, without a critic")
# A_t = Z_std - kl_coef * KL_t. One sampled answer, token by token:
A = reinforce_advantages(rollout, cfg, grid)  # (B, T)
i = z_std.min(1).values.argmin().item()  # the answer with the token that is liked least
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
# REINFORCE: -mean of A_t log pi(a_t | s_t). A small step along it raises the log-probability of tokens with A > 0 against the others.
student = copy.deepcopy(policy)
before, _ = token_logprobs(student, rollout.ids, mask)
loss, _ = reinforce_loss(before, A, mask)
loss.backward()
with torch.no_grad():
    for param in student.parameters():
        param -= 0.01 * param.grad
    change = token_logprobs(student, rollout.ids, mask)[0] - before
print(
    f"loss {loss:.4f}; mean change of log pi where A > 0: {change[mask & (A > 0)].mean():+.5f}, where A < 0: {change[mask & (A < 0)].mean():+.5f}"
)

# %%
section("17. The critic")
# V(s_t) is read at inputs[:, t], before the action is seen. Turn the first sign of the answer above round: V(s_t) must stay as it
# is, the score Z(s_t, a_t) must not.
critic = copy.deepcopy(reward_model).requires_grad_(True)  # it starts from the reward model
with torch.no_grad():
    t, (plus, minus) = m.nonzero()[1].item(), tokenizer.encode("+-")
    own, other = rollout.ids[i : i + 1], rollout.ids[i : i + 1].clone()
    other[0, t + 1] = plus if own[0, t + 1] == minus else minus  # another a_t = targets[0, t]
    for name, read in (
        ("read at s_t", lambda ids: state_values(critic, ids, mask[i : i + 1])),
        ("Z(s_t, a_t)", lambda ids: token_scores(reward_model, ids)),
    ):
        print(
            f"{name} {read(own)[0, t]:+.4f} with {tokenizer.decode([own[0, t + 1].item()])!r}, "
            f"{read(other)[0, t]:+.4f} with {tokenizer.decode([other[0, t + 1].item()])!r}"
        )
torch.nn.init.zeros_(critic.score.weight)  # and gets a new head
values = state_values(critic, rollout.ids, mask).detach()  # (B, T)
print(f"values {tuple(values.shape)}, all {values.abs().max():.0f} before it has learned")

# %%
section("18. PPO's advantages")
# A = Z_std - kl_coef * KL - V, and the critic's target is Z_std (Algorithm 1 of the paper). With V = 0 it is REINFORCE's advantage.
A, value_targets = ppo_advantages(rollout, values, cfg, grid)  # (B, T) each
print(
    "largest difference from REINFORCE's advantage: "
    f"{(A - reinforce_advantages(rollout, cfg, grid)).abs().max():.0f}"
)
print(
    f"the critic's loss: {value_loss(values, value_targets, mask)[0]:.4f} (targets of variance 1, predicted as 0)"
)

# %%
section("19. The ratio starts at 1")
# rho_t = pi(a_t | s_t) / pi_old(a_t | s_t). The rollout's log-probabilities come from the same forward as those of training, in the
# same micro-batches, so at the first minibatch the ratio is exactly 1, and PPO's gradient is REINFORCE's.
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
print(
    f"ratio of {len(ratio)} tokens: from {ratio.min():.6f} to {ratio.max():.6f}; loss {loss:.4f}, clip_frac {stats['clip_frac']:.1f}"
)
print(
    f"largest difference between the two gradients: {difference:.1e} (their largest entry: {max(g.abs().max() for g in ppo_gradient):.1e})"
)

# %%
section("20. The PPO update")
# Two passes over the rollout, two minibatches each. Afterwards some ratios have left 1 +- clip, and there is a KL to the reference.
# (explained_variance is that of the values the update began with, and they were all 0.)
optimizer, critic_optimizer = Optimizer(policy, grid, 4e-4), Optimizer(critic, grid, 2e-3)
greedy_before, sampled_before = solved(policy), solved(policy, 4, 1.0)
stats = ppo_step(policy, critic, optimizer, critic_optimizer, rollout, cfg, 4e-4, 2e-3)
print("  " + "  ".join(f"{k} {v:.4f}" for k, v in stats.items()))
with torch.no_grad():
    after, _ = token_logprobs(policy, rollout.ids, mask)
    ratio = (after - rollout.old_logprobs)[mask].exp()
print(
    f"ratio now: from {ratio.min():.3f} to {ratio.max():.3f}, {((ratio - 1).abs() > cfg.clip).float().mean():.1%} outside 1 +- {cfg.clip}"
)

# %%
section("21. Did it help?")
# The same prompts again, by the updated policy. (Real runs do this a dozen times or more: `python train.py`.)
again = rollout_stats(
    collect_rollout(policy, reference, reward, prompts, tokenizer.stop_ids, cfg, seed=8), grid
)
print(
    f"mean Z {rollout_stats(rollout, grid)['reward']:+.3f} -> {again['reward']:+.3f}; KL to the reference {again['kl_k1']:.4f} (k1), {again['kl_k3']:.4f} (k3) nats per token"
)
print(
    f"held-out prompts solved: greedily {greedy_before:.2f} -> {solved(policy):.2f}, by one sample {sampled_before:.2f} -> {solved(policy, 4, 1.0):.2f}"
)
print("next: python classroom/exercises.py list")
