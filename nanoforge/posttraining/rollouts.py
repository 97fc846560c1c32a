"""GRPO's source: prompts are answered by the model that trains, the answers are rewarded, and the answers are the batch.

Which prompts a step takes is a pure function of (arguments, step); the answers follow from the model and from numbers that are a function of
(seed, step, answer, token), so any number of ranks makes the same ones. A draw serves `steps_per_rollout` steps, and only between two draws is a run
saved: resuming needs no state.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nanoforge.data.batches import Mixture, Step, row_hash
from nanoforge.distributed import Ranks, RankSlice, is_sharded
from nanoforge.models.generation import Completion, SamplingParams, generate_batch
from nanoforge.posttraining.examples import Collator, Example, Examples, ExampleSource, Ids, padded
from nanoforge.posttraining.losses import group_advantages
from nanoforge.posttraining.rewards import Reward, Sample, total_reward
from nanoforge.rng import ROLLOUT, uniform


@dataclass(frozen=True)
class Answers:
    """How prompts are answered and rewarded."""

    net: nn.Module
    ranks: Ranks
    rewards: Sequence[Reward]
    generations: int  # answers to each prompt
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def draw(
        self,
        items: Sequence[Example],
        tokenizer,
        repeats: int,
        temperature: float,
        key: tuple[int, ...] = (),
        first: int = 0,
    ) -> list[Completion]:
        """Answers to these prompts, `repeats` to each; `key` and `first`, the number of the first of them, decide the draws."""
        training = self.net.training
        self.net.eval()
        sampling = SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            n=repeats,
            eos_id=tokenizer.eos_id,
            vocab_size=tokenizer.vocab_size,
        )
        answers = generate_batch(
            self.net,
            prompts=[item.sequences[0].ids.tolist() for item in items],
            sampling=sampling,
            uniform=lambda completions, token: uniform(*key, completions + first, token),
            any_rank_active=(lambda active: bool(self.ranks.all_reduce_max(active))) if is_sharded(self.net) else bool,
        )
        self.net.train(training)
        return answers

    def rewarded(
        self, items: Sequence[Example], answers: Sequence[Completion], tokenizer
    ) -> tuple[list[float], dict[str, Tensor]]:
        """The reward of each answer, and each reward's (sum, number)."""
        totals, each = [], {reward.name: [0.0, 0.0] for reward in self.rewards}
        for item, answer in zip(
            (item for item in items for _ in range(len(answers) // len(items))), answers, strict=True
        ):
            words = text_of(answer, tokenizer)
            sample = Sample(words, item.row, len(answer.ids), self.max_new_tokens, answer.ended)
            total, values = total_reward(self.rewards, sample)
            totals.append(total)
            for name, value in values.items():
                each[name][0] += value
                each[name][1] += 1
        return totals, {f"rewards/{name}": torch.tensor(pair) for name, pair in each.items()}


def text_of(answer: Completion, tokenizer) -> str:
    """Its text, without the end token."""
    return tokenizer.decode(answer.ids[:-1] if answer.ended else answer.ids)


class RolloutSource(ExampleSource):
    """Training batches of `rows` answers a step."""

    def __init__(
        self,
        datasets: Sequence[Examples],
        mixture: Mixture,
        rows: int,
        seed: int,
        answers: Answers,
        steps_per_rollout: int,
        scale: str,
        mask_truncated: bool,
    ):
        super().__init__(datasets, mixture, rows // answers.generations, seed, Collator())
        self.answers, self.steps_per_rollout, self.scale, self.mask_truncated = (
            answers,
            steps_per_rollout,
            scale,
            mask_truncated,
        )

    @property
    def tokens_per_step(self) -> float:
        """About, and of the prompts alone: how long answers will be is not known."""
        return super().tokens_per_step * self.steps_per_rollout * self.answers.generations

    def iter_steps(self, start_step: int, rows: RankSlice, *, pin: bool, hashed: bool) -> Iterator[Step]:
        start_rollout, remainder = divmod(start_step, self.steps_per_rollout)
        assert remainder == 0
        for draw, items in enumerate(self.iter_examples(start_rollout), start=start_rollout):
            yield from itertools.repeat(self.draw(draw, items, *rows, hashed), self.steps_per_rollout)

    def stream(self, start_step: int, rows: RankSlice, device: torch.device, *, hashed: bool) -> Iterator[Step]:
        """What a rank reads from a step on, sampled only when it is asked for: by then the model has learned."""
        for step in self.iter_steps(start_step, rows, pin=False, hashed=hashed):
            yield step._replace(batches=[batch.to(device) for batch in step.batches])

    def draw(self, draw: int, items: Sequence[Example], first: int, last: int, micro_batch: int, hashed: bool) -> Step:
        """Answers [first, last) of a draw to these prompts, as a step."""
        a, ranks, group = self.answers, self.answers.ranks, self.answers.generations
        own, tokenizer = items[first // group : last // group], self.datasets[0].coder.tokenizer
        answers = a.draw(own, tokenizer, group, a.temperature, (self.seed, ROLLOUT, draw), first)
        rewards, told = a.rewarded(own, answers, tokenizer)
        reward = torch.tensor(rewards, dtype=torch.float64)
        n, total, squares = ranks.all_reduce_(
            torch.tensor([len(reward), reward.sum(), reward.square().sum()], dtype=torch.float64)
        ).tolist()
        spread = torch.tensor(max(0.0, squares - total**2 / n) / max(1, n - 1)).sqrt()
        advantage = group_advantages(reward, group, self.scale, spread).float()
        learned = [answer.ended or not self.mask_truncated for answer in answers]
        sequences, old = [], []
        for item, answer, kept in zip((item for item in own for _ in range(group)), answers, learned, strict=True):
            prompt = item.sequences[0].ids
            ids = np.concatenate((prompt, np.array(answer.ids, dtype=np.int32)))
            sequences.append(Ids(ids, (np.arange(len(ids)) >= len(prompt)) & kept))
            old.append(np.concatenate((np.zeros(len(prompt) - 1), answer.logps)))
        tokens = ranks.all_reduce_(
            torch.tensor([sum(int(s.mask.sum()) for s in sequences), sum(len(s.ids) for s in sequences)])
        ).tolist()
        cuts = range(0, len(sequences), micro_batch)
        made = []
        for row in cuts:
            some = slice(row, row + micro_batch)
            batch = padded(sequences[some])
            before = torch.zeros(batch.extras["loss_mask"].shape)
            for line, values in zip(before, old[some], strict=True):
                line[: len(values)] = torch.from_numpy(values)
            batch = batch.with_tensors(old_logps=before, advantages=advantage[some])
            made.append(type(batch)(batch.tokens, batch.extras, len(cuts), max(1, tokens[0]) / ranks.world_size))
        return Step(
            made,
            row_hash([s.ids for s in sequences], first) if hashed else 0,
            tokens[1],
            told | self.told(reward, answers, group),
        )

    def told(self, reward: Tensor, answers: Sequence[Completion], group: int) -> dict[str, Tensor]:
        """What is told of a draw, (sum, number) each."""
        groups, lengths = reward.view(-1, group), torch.tensor([float(len(answer.ids)) for answer in answers])
        spread = groups.std(1) if group > 1 else torch.zeros(len(groups))
        ended = torch.tensor([answer.ended for answer in answers])
        sums = {
            "reward": reward, "reward_std": spread, "frac_reward_zero_std": spread == 0, "completions/mean_length": lengths, "completions/clipped_ratio": ~ended,
            "completions/mean_terminated_length": lengths[ended],
        }  # fmt: skip
        told = {
            name: torch.stack((values.double().sum(), torch.tensor(float(len(values))).double())).float()
            for name, values in sums.items()
        }
        largest = self.answers.ranks.all_reduce_max
        ends = {
            "completions/min_length": -largest(-int(lengths.min())),
            "completions/max_length": largest(int(lengths.max())),
        }
        return told | {name: torch.tensor([float(length), 1.0]) for name, length in ends.items()}


def evaluation(
    answers: Answers, examples: Examples, iters: int, size: int, net: nn.Module
) -> Iterator[tuple[dict[str, Tensor], bool]]:
    """The rewards of the likeliest answers to the first `iters` batches of `size` prompts, the loss being their negative: of this rank's part
    of each batch, and whether it has one."""
    for first in range(0, min(len(examples.items), iters * size), size):
        whole = examples.items[first : min(first + size, iters * size)]
        low, high = (
            rank * len(whole) // answers.ranks.world_size for rank in (answers.ranks.rank, answers.ranks.rank + 1)
        )
        some = whole[low:high] or whole[:1]
        rewards, told = answers.rewarded(
            some, answers.draw(some, examples.coder.tokenizer, 1, 0.0), examples.coder.tokenizer
        )
        sums = torch.tensor([sum(rewards), float(len(rewards))])
        yield {"loss": sums * torch.tensor([-1.0, 1.0]), "reward": sums, **told}, high > low


def samples(answers: Answers, examples: Examples, count: int, first_row: int) -> list[dict[str, str]]:
    """The likeliest answers to the first examples, as texts; rows of a soft prompt, ids from first_row on, are left out of the prompts."""
    tokenizer, items, told = examples.coder.tokenizer, [], []
    for item in examples.items[:count]:
        sequence = item.sequences[0]
        ends = np.flatnonzero(sequence.mask)
        start = int(ends[0]) if len(ends) else len(sequence.ids)  # of what is learned
        if item.row and start:
            items.append(Example((Ids(sequence.ids[:start], sequence.mask[:start]),), item.row))
    if not items:
        return []
    for item, answer in zip(items, answers.draw(items, tokenizer, 1, 0.0), strict=True):
        prompt = tokenizer.decode([i for i in item.sequences[0].ids.tolist() if i < first_row])
        told.append({"prompt": prompt, "completion": text_of(answer, tokenizer)})
    return told
