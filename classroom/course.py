"""The course around the exercises: for each chapter goals, time and a run with one's own code; two hints
each.

exercises.py prints it (`list`, `hint`). Points are in the markers (difficulty, 1 to 5), titles too.
"""

from typing import NamedTuple


class Chapter(NamedTuple):
    title: str
    minutes: int  # for somebody who meets it for the first time
    needs: str  # to know before
    goals: tuple  # afterwards one can ...
    run: str  # a command to run with one's own code
    shows: str  # what it should show


CHAPTERS = {
    "1": Chapter(
        title="A decoder",
        minutes=120,
        needs="PyTorch: broadcasting, nn.Module; attention from any textbook",
        goals=(
            "write each part of a LLaMA block with the shape at every line",
            "say which part works in fp32 and why",
            "read a sub-layer that runs on one process or on many, unchanged",
        ),
        run="python train.py --stage sft --run_dir runs/first --steps 100",
        shows="the loss falls from 6.06 nats per token to about 0.5: your model learns to calculate",
    ),
    "2": Chapter(
        title="Tensor parallelism",
        minutes=120,
        needs="1.5 and 1.6, to see where f and g are used; torch.autograd.Function",
        goals=(
            "derive which of f and g communicates forward, which backward, and where each one belongs",
            "cut a matrix by rows or by columns and say what that costs",
            "take a softmax over a vocabulary that no process holds whole",
        ),
        run="torchrun --nproc_per_node 2 -- train.py --stage sft --run_dir runs/tp2 --steps 20",
        shows="the losses of the same run in one process (no torchrun, --run_dir runs/tp1), up to rounding",
    ),
    "3": Chapter(
        title="The data",
        minutes=45,
        needs="the alignment picture in data.py",
        goals=(
            "say what index t means in inputs, targets, mask, scores, values and rewards",
            "make a mask from lengths, and say what goes wrong when it is made from ids",
            "shuffle without a state, so that a run resumes exactly",
        ),
        run="python classroom/walkthrough.py",
        shows="in section 3 the first x is at the first target of the response, the last at the stop token",
    ),
    "4": Chapter(
        title="Reward models",
        minutes=180,
        needs="chapter 3 (read its docstrings); logistic regression; for 4.5 the chain rule",
        goals=(
            "derive Q-RM's loss from pairs and explain 2.1269",
            "compare token, outcome, step and DPO rewards on the same pairs",
            "write a backward by hand and check it against autograd",
            "measure whether a score knows where an answer goes wrong",
        ),
        run="python train.py --stage rm --run_dir runs/mine",
        shows="the first loss is 2.1269 = log(1 + e^2), and most held-out pairs end in the right order",
    ),
    "5": Chapter(
        title="REINFORCE",
        minutes=120,
        needs="chapter 3's alignment; the policy-gradient theorem",
        goals=(
            "estimate a KL from one sample, with and without variance reduction",
            "turn scores into advantages, and say what each normalisation changes",
            "say why an outcome reward is summed over time and a Q is not",
        ),
        run="python train.py --stage reinforce --run_dir runs/mine",
        shows="kl_k1 is 0 in the first rollout and grows; greedy pass@1 rises above that of sft",
    ),
    "6": Chapter(
        title="PPO",
        minutes=120,
        needs="5.2, 5.3 and 5.5",
        goals=(
            "place a critic before the action and a reward after it",
            "write GAE with its edge at the last token",
            "say when the clip stops a gradient, and when it does not",
        ),
        run="python train.py --stage ppo --run_dir runs/mine",
        shows="ratio_max and clip_frac say that the clip is at work; greedy pass@1 rises above that of sft",
    ),
}

HINTS = {  # {exercise: (a nudge, the idea)}
    "1.1": (
        "Which dimension is the mean over, and which dtype can hold the square of 400?",
        "Square in fp32, mean over the last dimension with keepdim, add eps, torch.rsqrt; go back to x's "
        "dtype and multiply with the weight last.",
    ),
    "1.2": (
        "Write down i for E = 6, then the three wavelengths. For the scaling, count turns within the old "
        "length.",
        "The exponents are 0, 2, 4 ... E - 2 over E. C/w = C f / (2 pi) turns; the share of f to keep is "
        "linear in them, 0 at `low` and 1 at `high`, clamped.",
    ),
    "1.3": (
        "A pair is a point in the plane: (i, i + E/2), not (2i, 2i + 1).",
        "x.chunk(2, dim=-1) gives both coordinates of all pairs. Rotate the points by the textbook formula, "
        "put the halves back side by side, and undo what fp32 angles promote.",
    ),
    "1.4": (
        "Where does torch's own function want the heads?",
        "F.scaled_dot_product_attention takes (B, heads, T, E), so transpose in and out. It has one flag "
        "for the causal mask and one for query heads that share a key/value head.",
    ),
    "1.5": (
        "Follow the shapes: D, heads * E, (heads, E), attention, heads * E, D. What is the same on all "
        "ranks?",
        "copy_to_tp on x once, before the three products; unflatten heads; apply_rope to two of the three; "
        "attend; flatten; o_proj; then the ranks' parts are summed by reduce_from_tp.",
    ),
    "1.6": (
        "SiLU belongs to one of the two projections only.",
        "One copy_to_tp before both column-parallel layers, one reduce_from_tp after the row-parallel one, "
        "and F.silu on the gate, times up, in between.",
    ),
    "1.7": (
        "Stack the probabilities into a tower; the uniform picks a height.",
        "The total is the last entry of the cumulative sum, not 1. torch.searchsorted with right=True finds "
        "the first entry above the height. Watch u just below 1, where rounding reaches the top.",
    ),
    "2.1": (
        "The same x feeds every rank; whose gradients does it need?",
        "Forward returns x (as a view) and remembers the group; backward sums over the ranks. A backward "
        "returns one value for each argument of forward: None for the group.",
    ),
    "2.2": (
        "y = x_1 + x_2: what is dL/dx_1, given dL/dy?",
        "Forward is a sum over the ranks that leaves its argument alone (all_reduce of this file does); "
        "backward hands the gradient on.",
    ),
    "2.3": (
        "Rows of W are output features. How many of the d_out are mine?",
        "shard_range(d_out, rank, size) gives start and stop; the parent's constructor makes a layer with "
        "that many.",
    ),
    "2.4": (
        "Columns of W are input features. What would the sum over the ranks do to a bias?",
        "As in 2.3, but the cut is along d_in, and the layer never gets a bias.",
    ),
    "2.5": (
        "What does a rank answer for a word that another rank holds?",
        "Look up id - start, with 0 in the place of foreign ids so that the index is valid; zero their rows; "
        "reduce_from_tp. One process needs none of it.",
    ),
    "2.6": (
        "Which two numbers per row must all ranks agree on?",
        "The maximum needs no gradient: all_reduce with ReduceOp.MAX. The sum of exponentials does: "
        "reduce_from_tp. Each rank's outputs depend on its logarithm, so that goes through copy_to_tp.",
    ),
    "2.7": (
        "As in 2.5, with gather in the place of a lookup.",
        "Gather at target - start where the target is mine, zero elsewhere, and sum over the ranks.",
    ),
    "3.1": (
        "Draw the picture of the docstring for a prompt of 1.",
        "Make ids full of pad_id and a mask of False one column shorter, and fill them row by row. The "
        "first response token is at len(prompt) in ids, so one place earlier in targets.",
    ),
    "3.2": (
        "Number all rows that are ever read: 0, 1, 2 ... Which epoch is number p in, and where?",
        "Batch `step` reads the places step * batch_size and on; p // n is its epoch, p % n its place in "
        "that epoch's permutation.",
    ),
    "4.1": (
        "After which token has the model seen s_t and a_t?",
        "The model reads all T+1 ids; the scalar where targets[:, t] is the input belongs to t. One "
        "position is too many: which end?",
    ),
    "4.2": (
        "What is NaN times 0? And 0 divided by 0?",
        "Fill with zeros outside the mask, do not multiply; divide by the number of positions, but by at "
        "least 1.",
    ),
    "4.3": (
        "Try log(sigmoid(-900)) in torch.",
        "F.logsigmoid stays finite. The margin is subtracted from the scaled gap, so that a pair costs "
        "something until beta * gap exceeds it.",
    ),
    "4.4": (
        "Two functions above do nearly all of it.",
        "Mean of each row's response, then even rows (chosen) against odd rows (rejected). Pass beta and "
        "margin on.",
    ),
    "4.5": (
        "Work from the loss to x: m, then gaps, then Z, then r and the product. The docstring has each "
        "derivative.",
        "First dL/dm of each pair, times the incoming gradient; then dL/dZ of each token; then dx from the "
        "two terms of dZ/dx, and s = sum dL/dZ r x, from which both weights' gradients follow.",
    ),
    "4.6": (
        "What is true of the last token and of no other?",
        "It is in the mask and its right neighbour is not. F.pad moves a mask by one and puts a False at "
        "the end.",
    ),
    "4.7": (
        "A mean over one token is that token's score.",
        "masked_mean over last_token_mask, then the cross-entropy that takes logits, which is finite for "
        "all of them.",
    ),
    "4.8": (
        "DPO is a pairwise loss. Of which number of an answer?",
        "The sum (not the mean) over the response of log pi - log ref; no margin; mind what is outside the "
        "mask.",
    ),
    "4.9": (
        "At rank k an answer is chosen among those from k on.",
        "rest_k = log sum_(j >= k) exp(s_j) is a cumulative log-sum-exp from the right: flip, accumulate, "
        "flip. At the last rank there is no choice, so leave it out of the mean.",
    ),
    "4.10": (
        "Start from the scores of all response tokens.",
        "Zero everywhere but at the last token; for every_token, the row's sum is that one score: spread it "
        "over the mask.",
    ),
    "4.11": (
        "No shift: token_logprobs is already in the place of targets.",
        "It returns log-probabilities and entropies, zero outside the mask. Policy minus reference, times "
        "beta.",
    ),
    "4.12": (
        "Count by hand for 3 1 1 2 with the error at 3.",
        "For wins compare Z at the error with each Z before it. z.diff()[i] is Z_(i+1) - Z_i, so the drop "
        "at the error is at entry error - 1. Ties count a half in wins and in choices.",
    ),
    "5.1": (
        "k3 = ratio - 1 - log ratio. Of which ratio, and what is its logarithm in terms of k1?",
        "The ratio is ref / pi = exp(-k1). torch.expm1 keeps the digits that exp(x) - 1 loses.",
    ),
    "5.2": (
        "Which of mean and sigma does each `how` use? What if sigma is 0?",
        "Count and sum over the mask, summed over the ranks by all_sum; then the squares of what is left "
        "after the mean, summed likewise; divide by the count. A sigma that is "
        "only rounding counts as 1.",
    ),
    "5.3": (
        "Begin at the end: what is G at the last token?",
        "One running number per row, from the last token to the first: r_t + gamma * running where the mask "
        "is, unchanged elsewhere.",
    ),
    "5.4": (
        "View the rewards as (prompts, group). For rloo: what is the mean of the others in terms of the "
        "mean of all?",
        "R_i minus the mean of the others is (R_i - mean of all) n / (n - 1). For grpo, torch's std is "
        "already that of a sample. Zero the groups whose std is rounding last, when 0 / 0 has been made.",
    ),
    "5.5": (
        "Ascent on A log pi is descent on what? Whose gradient must not flow?",
        "Pick the response tokens of both, the advantages detached, and take minus the mean of the products.",
    ),
    "6.1": (
        "V(s_t) must not have seen a_t = targets[:, t].",
        "at_states gives the residual stream where each s_t ends, critic.scalars makes numbers of it, and "
        "one more function of model.py puts them at t and zeros elsewhere.",
    ),
    "6.2": (
        "Begin at the end. What is V after the last token?",
        "Zero both inputs outside the mask. From the last token to the first, keep two numbers per row: the "
        "advantage and the value of the position to the right; reset the advantage outside the mask.",
    ),
    "6.3": (
        "Compare the three cases of the docstring: what do they share?",
        "shape_rewards gives Z_std and Z_std - penalty. token: one line, and the target is Z_std without "
        "the penalty. gae: hand the rewards on. Anything else: reinforce.py knows, and the critic still "
        "learns Z_std.",
    ),
    "6.4": (
        "Draw min(rho A, clip(rho) A) over rho, once for A > 0 and once for A < 0.",
        "The minimum cuts gains at 1 +- clip and leaves losses alone. A token counts as clipped when its "
        "ratio is outside on the side that its advantage asks for. Detach what must not learn.",
    ),
}
