"""The reference model of DPO, KTO and GRPO, and the cache of its log-probabilities.

Knows nothing of objectives, nor of how the model is built.
"""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nanoforge.console import ProgressBar
from nanoforge.data.batches import Batch
from nanoforge.distributed import Ranks
from nanoforge.errors import UserError
from nanoforge.posttraining.examples import Examples, PreferenceCollator
from nanoforge.posttraining.losses import pair_sums, per_token_logps
from nanoforge.training import checkpoint
from nanoforge.training.evaluation import evaluation_mode


@dataclass(frozen=True)
class ReferenceModel:
    """The model that training started from: `model` as it is within `reference_mode()`, always in evaluation mode."""

    model: nn.Module
    reference_mode: Callable[[], AbstractContextManager[None]]

    @torch.no_grad()
    def per_token_logps(
        self, tokens: Tensor, loss_mask: Tensor, temperature: float = 1.0, position_ids: Tensor | None = None
    ) -> Tensor:
        """As losses.per_token_logps: (B, T)."""
        with self.reference_mode(), evaluation_mode(self.model):
            return per_token_logps(self.model, tokens, loss_mask, temperature, position_ids)

    def pair_logps(self, batch: Batch) -> Tensor:
        """Log-probabilities of the chosen and the rejected completion of each row: (B, 2)."""
        extras = batch.extras
        logps = self.per_token_logps(batch.tokens, extras["loss_mask"], position_ids=extras["position_ids"])
        return pair_sums(logps, extras["is_rejected"])


@dataclass(frozen=True)
class ReferenceCache:
    """The reference model's log-probabilities of examples: computed once, and kept beside the data, in a file whose
    name has a hash of all that they depend on."""

    reference: ReferenceModel
    identity: str  # of the reference model
    batch_size: int
    ranks: Ranks
    log: Callable[[str], None]
    collate: PreferenceCollator

    def add(self, examples: dict[str, list[Examples]], folders: dict[str, Path]) -> dict[str, list[Examples]]:
        """The examples with their log-probabilities. folders: dataset -> where they are kept."""
        result: dict[str, list[Examples]] = {}
        for split, datasets in examples.items():
            result[split] = []
            for dataset in datasets:
                name = f"reference_{split}_{self.key(dataset)}.safetensors"
                logps = self.logps(dataset, folders[dataset.name] / name)
                result[split].append(with_reference(dataset, logps))
        return result

    def key(self, dataset: Examples) -> str:
        """A hash of the reference model and of the tokens."""
        digest = hashlib.sha256(self.identity.encode())
        for example in dataset.rows:
            for ids, loss_mask, _ in example.sequences:
                digest.update(b"%d " % len(ids) + ids.tobytes() + loss_mask.tobytes())
        return digest.hexdigest()[:16]

    def logps(self, dataset: Examples, path: Path) -> Tensor:
        """(N, 2), of the two sequences of each example; from the file if all ranks can read it."""
        logps = read_logps(path, len(dataset.rows))
        if not self.ranks.all_reduce_max(logps is None):
            assert logps is not None
            return logps
        logps = self.compute(dataset)
        if self.ranks.is_main:
            try:
                checkpoint.write_tensors(path, {"logps": logps})
            except UserError as error:
                self.log(f"--reference=cache: {error}; the next run computes it again")
        return logps

    def compute(self, dataset: Examples) -> Tensor:
        """(N, 2) on the CPU. The ranks share the work."""
        rows, ranks, batch_size = dataset.rows, self.ranks, self.batch_size
        logps = torch.zeros(len(rows), 2)
        starts = range(0, len(rows), batch_size * ranks.world_size)
        title = f"log-probabilities of the reference model on {dataset.name}"
        progress = ProgressBar(title, "batches", len(starts), silent=not ranks.is_main)
        for start in progress.over(starts):
            own_start = start + ranks.rank * batch_size
            own_rows = range(own_start, min(own_start + batch_size, len(rows)))
            # a rank without rows reads one all the same: all ranks have to call a sharded model as often
            batch = self.collate(rows, own_rows or range(1)).to(ranks.device)
            batch_logps = self.reference.pair_logps(batch)
            if own_rows:
                logps[own_rows.start : own_rows.stop] = batch_logps.cpu()
        progress.close()
        return ranks.all_reduce_(logps)


def read_logps(path: Path, n_rows: int) -> Tensor | None:
    """The log-probabilities (n_rows, 2) in a file; None if it is missing or damaged."""
    try:
        logps = checkpoint.read_tensors(path)["logps"]
    except (OSError, SafetensorError, KeyError):
        return None
    return logps if logps.shape == (n_rows, 2) else None


def with_reference(dataset: Examples, logps: Tensor) -> Examples:
    """The dataset with the reference model's log-probabilities (N, 2) of its examples."""
    pairs = zip(dataset.rows, logps.tolist(), strict=True)
    rows = [example._replace(ref_logps=tuple(values)) for example, values in pairs]
    return Examples(dataset.name, rows, dataset.seed, dataset.index)
