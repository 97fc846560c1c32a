"""Rollouts for GRPO: the model completes prompts, rewards score the completions, and these are the training batch.

A rollout has four steps (Shao et al. 2024, algorithm 1):

    sample      a group of completions o_1 ... o_G of each prompt q from the policy
    score       their rewards r_1 ... r_G
    normalize   the advantages A_i = (r_i - mean(r)) / std(r), within the group
    pack        prompts, completions, old log-probabilities and advantages as batches

Which prompts a rollout takes is a pure function of (arguments, step). Its completions follow from the model and from
random numbers that are a function of (seed, rollout, completion, token), so any number of ranks samples the same ones.
A rollout serves `steps_per_rollout` optimizer steps. A run is saved only between two rollouts: resuming needs no state.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nanoforge.data.batches import Batch, Metrics, Mixture, Step, row_hash
from nanoforge.data.tokenization import Tokenizer
from nanoforge.distributed import Ranks, RankSlice, is_sharded
from nanoforge.models.generation import Completion, SamplingParams, UniformDraws, generate_batch, uniform_draws
from nanoforge.posttraining.examples import Collator, Example, Examples, ExampleSource, TokenSequence, Widths, pad
from nanoforge.posttraining.losses import group_advantages
from nanoforge.posttraining.rewards import Reward, RewardError, Sample, shorten, total_reward
from nanoforge.rng import ROLLOUT
from nanoforge.training.evaluation import evaluation_mode

# ---------------------------------------------------------------------------------------------------------------------
# sample


@dataclass(frozen=True)
class Sampler:
    """Generates completions of prompts with the model that is trained. `sampling.n` is the group size."""

    model: nn.Module
    tokenizer: Tokenizer
    sampling: SamplingParams
    ranks: Ranks

    def generate(self, prompts: Sequence[Example], seed: tuple[int, ...], first_index: int) -> list[Completion]:
        """A group of completions of each prompt, the groups after each other.

        The seed, a completion's index in the rollout batch of all ranks and a token's index alone decide the draws.
        first_index: that of the first completion here.
        """
        return self.complete(prompts, self.sampling, uniform_draws(*seed, first=first_index))

    def generate_greedy(self, prompts: Sequence[Example]) -> list[Completion]:
        """One completion of each prompt, made of the likeliest tokens."""
        return self.complete(prompts, dataclasses.replace(self.sampling, n=1, temperature=0.0))

    def complete(
        self, prompts: Sequence[Example], sampling: SamplingParams, draws: UniformDraws | None = None
    ) -> list[Completion]:
        """Generate in evaluation mode, and leave the model in the mode that it was in."""
        # A token of a compiled model is decoded by a compiled step. On a CPU that gains nothing.
        is_compiled = bool(self.model.compiled_parts) and self.ranks.device.type == "cuda"
        any_rank: Callable[[bool], bool] = bool
        if is_sharded(self.model):  # all ranks have to call it together
            any_rank = lambda holds: bool(self.ranks.all_reduce_max(holds))  # noqa: E731
        with evaluation_mode(self.model):
            return generate_batch(
                self.model,
                prompts=[prompt.sequences[0].ids.tolist() for prompt in prompts],
                sampling=dataclasses.replace(sampling, compiled=is_compiled and not is_sharded(self.model)),
                uniform=draws,
                any_rank=any_rank,
            )


def decode_completion(completion: Completion, tokenizer: Tokenizer, *, continues_text: bool = False) -> str:
    """The text of a completion, without its end-of-sequence token.

    continues_text: it is shown behind its prompt, so a space before its first word counts.
    """
    ids = completion.ids[:-1] if completion.ended else completion.ids
    return tokenizer.decode_continuation(ids) if continues_text else tokenizer.decode(ids)


def repeat_each(prompts: Sequence[Example], n: int) -> list[Example]:
    """Each prompt n times, as its completions follow each other."""
    return [prompt for prompt in prompts for _ in range(n)]


# ---------------------------------------------------------------------------------------------------------------------
# score


@dataclass(frozen=True)
class Scorer:
    """The weighted sum of the rewards of a completion."""

    rewards: Sequence[Reward]
    tokenizer: Tokenizer
    max_new_tokens: int

    def score_together(
        self, prompts: Sequence[Example], completions: Sequence[Completion], ranks: Ranks
    ) -> tuple[Tensor, Metrics]:
        """`score`, a collective. Raises RewardError on all ranks where one of them fails."""
        failure, scores = "", None
        try:
            scores = self.score(prompts, completions)
        except RewardError as error:
            failure = str(error)
        failure = ranks.first_message(failure)
        if failure or scores is None:
            raise RewardError(failure)
        return scores

    def score(self, prompts: Sequence[Example], completions: Sequence[Completion]) -> tuple[Tensor, Metrics]:
        """(total rewards (N,) float64, metrics of each reward) of N completions, as many of each prompt.

        Raises RewardError.
        """
        group_size = len(completions) // len(prompts)
        totals: list[float] = []
        values: dict[str, list[float]] = {reward.name: [] for reward in self.rewards}
        for prompt, completion in zip(repeat_each(prompts, group_size), completions, strict=True):
            sample = Sample(
                completion=decode_completion(completion, self.tokenizer),
                problem=dict(prompt.row),  # which a user's function may change
                n_tokens=len(completion.ids),
                max_tokens=self.max_new_tokens,
                ended=completion.ended,
            )
            total, sample_values = total_reward(self.rewards, sample)
            totals.append(total)
            for name, value in sample_values.items():
                values[name].append(value)
        metrics = {
            f"rewards/{name}": float64_sum_and_count(torch.tensor(by_name, dtype=torch.float64))
            for name, by_name in values.items()
        }
        return torch.tensor(totals, dtype=torch.float64), metrics


# ---------------------------------------------------------------------------------------------------------------------
# the source of training batches


@dataclass(frozen=True)
class RolloutConfig:
    """How a rollout is made."""

    sampler: Sampler
    scorer: Scorer
    scale_rewards: str  # as group_advantages' scale
    mask_truncated: bool  # completions cut at max_new_tokens don't count in the loss
    steps_per_rollout: int  # optimizer steps on a rollout batch (GRPO's mu)
    widths: Widths  # of its micro-batches


PATIENCE = 3  # rollouts in a row without anything to learn before the run says so


class RolloutSource(ExampleSource):
    """Training batches of `rows` completions a step, of which each group completes a prompt of the datasets."""

    def __init__(self, datasets: Sequence[Examples], mixture: Mixture, rows: int, seed: int, rollout: RolloutConfig):
        self.group_size = rollout.sampler.sampling.n
        super().__init__(datasets, mixture, rows // self.group_size, seed, Collator())
        self.rollout = rollout
        self.ranks = rollout.sampler.ranks
        self.steps_per_rollout = rollout.steps_per_rollout

    @property
    def tokens_per_step(self) -> float:
        """An estimate from the prompts alone: the length of completions is not known in advance."""
        return super().tokens_per_step * self.steps_per_rollout * self.group_size

    def stream(
        self, start_step: int, rows: RankSlice, device: torch.device, *, hashed: bool
    ) -> Generator[Step, None, None]:
        """What a rank reads from a step on, sampled only when it is asked for: by then the model has learned."""
        for step in self.iter_steps(start_step, rows, pin=False, hashed=hashed):
            yield step._replace(batches=[batch.to(device) for batch in step.batches])

    def iter_steps(self, start_step: int, rows: RankSlice, *, pin: bool, hashed: bool) -> Iterator[Step]:
        """The completions [rows.start, rows.stop) of each step; all steps of a rollout have the same ones."""
        start_rollout, remainder = divmod(start_step, self.steps_per_rollout)
        assert remainder == 0, "a run is resumed only between two rollouts"
        n_without_signal = 0  # rollouts in a row
        for rollout_index, prompts in enumerate(self.iter_examples(start_rollout), start=start_rollout):
            own_prompts = prompts[rows.start // self.group_size : rows.stop // self.group_size]
            step = self.collect(rollout_index, own_prompts, rows, hashed=hashed)
            n_without_signal = n_without_signal + 1 if step.note else 0
            later = step._replace(note="")
            yield step if n_without_signal == PATIENCE else later
            yield from itertools.repeat(later, self.steps_per_rollout - 1)

    def collect(self, rollout_index: int, prompts: Sequence[Example], rows: RankSlice, *, hashed: bool) -> Step:
        """This rank's part of a rollout: sample, score, normalize, pack."""
        # 1. Sample a group of completions of each prompt.
        completions = self.rollout.sampler.generate(
            prompts, seed=(self.seed, ROLLOUT, rollout_index), first_index=rows.start
        )
        # 2. Score every completion.
        rewards, reward_metrics = self.rollout.scorer.score_together(prompts, completions, self.ranks)  # (N,)
        # 3. Normalize the rewards of each group to advantages.
        advantages = self.normalize(rewards)  # (N,)
        # 4. Pack it all into micro-batches.
        step = self.pack(prompts, completions, advantages, rows, hashed=hashed)
        metrics = rollout_metrics(rewards, completions, self.group_size, self.ranks)
        note = self.missing_signal(prompts[0], completions, rewards, advantages, step)
        return step._replace(metrics=reward_metrics | metrics, note=note)

    def missing_signal(
        self, prompt: Example, completions: Sequence[Completion], rewards: Tensor, advantages: Tensor, step: Step
    ) -> str:
        """Why no rank has anything to learn from a rollout, with what the rewards expect and the first completion; ""
        where there is something."""
        in_loss = torch.cat([batch.extras["loss_mask"].any(1) for batch in step.batches])
        if self.ranks.all_reduce_max(bool((advantages * in_loss).any())):
            return ""
        reason = "all completions of a prompt get the same reward, so their advantages are 0"
        if advantages.any():
            reason = "only completions cut at --max_new_tokens differ in reward, and --mask_truncated leaves them out"
        elif not any(completion.ended for completion in completions):
            reason += "; none of them ended within --max_new_tokens"
        scorer = self.rollout.scorer
        expected = "".join(f"\n    {reward.name}: {reward.description}" for reward in scorer.rewards)
        text = shorten(repr(decode_completion(completions[0], scorer.tokenizer)))
        row = shorten(json.dumps(prompt.row, ensure_ascii=False, default=str))
        return (
            f"{PATIENCE} rollouts in a row taught nothing: {reason}. --reward expects{expected}\n"
            f"    a completion: {text}, reward {float(rewards[0]):g}, of the row {row}\n"
            "    fine-tune first (--objective=sft), ask for the format in the prompts, reward parts of it "
            "(--reward=correct:1,format:0.5), or raise --temperature, --num_generations or --max_new_tokens"
        )

    def normalize(self, rewards: Tensor) -> Tensor:
        """The advantages of this rank's rewards: (N,) float32."""
        std = None
        if self.rollout.scale_rewards == "batch":
            std = std_over_ranks(rewards, self.ranks)
        return group_advantages(rewards, self.group_size, self.rollout.scale_rewards, std).float()

    def pack(
        self,
        prompts: Sequence[Example],
        completions: Sequence[Completion],
        advantages: Tensor,
        rows: RankSlice,
        *,
        hashed: bool,
    ) -> Step:
        """The rollout as a step, cut into micro-batches."""
        sequences = []
        for prompt, completion in zip(repeat_each(prompts, self.group_size), completions, strict=True):
            in_loss = completion.ended or not self.rollout.mask_truncated
            sequences.append(join(prompt, completion, in_loss=in_loss))
        loss_tokens = sum(int(sequence.loss_mask.sum()) for sequence in sequences)
        tokens = sum(len(sequence.ids) for sequence in sequences)
        loss_tokens, tokens = self.ranks.all_reduce_(torch.tensor([loss_tokens, tokens])).tolist()

        starts = range(0, len(sequences), rows.micro_batch_size)
        batches = []
        for start in starts:
            micro_batch = slice(start, start + rows.micro_batch_size)
            batch = pad(sequences[micro_batch], self.rollout.widths)
            extras = {
                "old_logps": align_logps(completions[micro_batch], sequences[micro_batch], batch.tokens.size(1) - 1),
                "advantages": advantages[micro_batch],
            }
            batches.append(
                Batch(
                    tokens=batch.tokens,
                    extras=batch.extras | extras,
                    n_micro_batches=len(starts),
                    num_loss_tokens=max(1, loss_tokens) / self.ranks.world_size,
                )
            )
        data_hash = row_hash([sequence.ids for sequence in sequences], rows.start) if hashed else 0
        return Step(batches, data_hash, tokens)


def std_over_ranks(values: Tensor, ranks: Ranks) -> Tensor:
    """The standard deviation of the values (N,) float64 of all ranks: () float32."""
    sums = torch.tensor([len(values), values.sum(), values.square().sum()], dtype=torch.float64)
    count, total, squares = ranks.all_reduce_(sums).tolist()
    variance = max(0.0, squares - total**2 / count) / max(1, count - 1)
    return torch.tensor(variance).sqrt()


def join(prompt: Example, completion: Completion, *, in_loss: bool) -> TokenSequence:
    """A prompt and a completion. in_loss: whether the completion's tokens count in the loss."""
    prompt_ids = prompt.sequences[0].ids
    ids = np.concatenate((prompt_ids, np.array(completion.ids, dtype=np.int32)))
    is_completion = np.arange(len(ids)) >= len(prompt_ids)
    return TokenSequence(ids, is_completion & in_loss)


def align_logps(completions: Sequence[Completion], sequences: Sequence[TokenSequence], width: int) -> Tensor:
    """The log-probabilities with which completions were sampled, at the positions of their targets: (B, width)."""
    old_logps = np.zeros((len(completions), width), dtype=np.float32)
    for row, (completion, sequence) in enumerate(zip(completions, sequences, strict=True)):
        stop = len(sequence.ids) - 1  # a target stands one position before its token
        old_logps[row, stop - len(completion.logps) : stop] = completion.logps
    return torch.from_numpy(old_logps)


# ---------------------------------------------------------------------------------------------------------------------
# metrics


def float64_sum_and_count(values: Tensor) -> Tensor:
    """As objectives.sum_and_count, (2,) float32, but summed in float64, in which rewards are."""
    return torch.stack((values.double().sum(), torch.tensor(len(values)).double())).float()


def rollout_metrics(rewards: Tensor, completions: Sequence[Completion], group_size: int, ranks: Ranks) -> Metrics:
    """TRL's metrics of a rollout, from the rewards (N,) of its completions. Extremes are taken over all ranks."""
    groups = rewards.view(-1, group_size)
    group_std = groups.std(1) if group_size > 1 else torch.zeros(len(groups))
    lengths = torch.tensor([float(len(completion.ids)) for completion in completions])
    ended = torch.tensor([completion.ended for completion in completions])
    min_length = -ranks.all_reduce_max(-int(lengths.min()))
    max_length = ranks.all_reduce_max(int(lengths.max()))
    return {
        "reward": float64_sum_and_count(rewards),
        "reward_std": float64_sum_and_count(group_std),
        "frac_reward_zero_std": float64_sum_and_count(group_std == 0),
        "completions/mean_length": float64_sum_and_count(lengths),
        "completions/clipped_ratio": float64_sum_and_count(~ended),
        "completions/mean_terminated_length": float64_sum_and_count(lengths[ended]),
        "completions/min_length": torch.tensor([float(min_length), 1.0]),
        "completions/max_length": torch.tensor([float(max_length), 1.0]),
    }


# ---------------------------------------------------------------------------------------------------------------------
# evaluation


def evaluate_rewards(
    sampler: Sampler, scorer: Scorer, examples: Examples, n_batches: int, batch_size: int
) -> Iterator[tuple[Metrics, bool]]:
    """The rewards of greedy completions of this rank's part of each batch of prompts, and whether it has one.

    The loss is the negative reward.
    """
    for rows, has_rows in examples.eval_rows(n_batches * batch_size, batch_size, sampler.ranks):
        prompts = examples.rows[rows.start : rows.stop]
        rewards, metrics = scorer.score_together(prompts, sampler.generate_greedy(prompts), sampler.ranks)
        reward = float64_sum_and_count(rewards)
        yield {"loss": reward * torch.tensor([-1.0, 1.0]), "reward": reward, **metrics}, has_rows


def sample_completions(sampler: Sampler, examples: Examples, count: int, prompt_offset: int) -> list[dict[str, str]]:
    """The prompts of the first `count` examples and their greedy completions, as texts. Packed examples have no prompt.

    Virtual tokens, whose ids start at prompt_offset, are no part of a text.
    """
    prompts = []
    for example in examples.rows[:count]:
        ids, loss_mask, _ = example.sequences[0]
        prompt_length = int(loss_mask.argmax()) if loss_mask.any() else len(ids)
        if example.row and prompt_length:
            prompt_sequence = TokenSequence(ids[:prompt_length], loss_mask[:prompt_length])
            prompts.append(Example((prompt_sequence,), example.row))
    if not prompts:
        return []
    samples = []
    for prompt, completion in zip(prompts, sampler.generate_greedy(prompts), strict=True):
        prompt_ids = [token for token in prompt.sequences[0].ids.tolist() if token < prompt_offset]
        samples.append(
            {
                "prompt": sampler.tokenizer.decode(prompt_ids),
                "completion": decode_completion(completion, sampler.tokenizer),
            }
        )
    return samples
