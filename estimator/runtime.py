"""A checkpoint -> scores, without torch: ONNX Runtime, tokenizers, numpy. Safe to call from several threads.

Shapes: B prompts, T tokens, K pools, H heads, O = K * H outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as onnx_errors
from tokenizers import Tokenizer

from depo_gateway.estimator import calibration, checkpoint, text, wide
from depo_gateway.estimator.calibration import Calibration, calibrate_heads
from depo_gateway.estimator.checkpoint import Manifest
from depo_gateway.estimator.heads import split_heads
from depo_gateway.estimator.text import Prepared

# ONNX Runtime's errors have no common base class but Exception
ONNX_ERRORS = (
    onnx_errors.Fail,
    onnx_errors.InvalidArgument,
    onnx_errors.InvalidGraph,
    onnx_errors.InvalidProtobuf,
    onnx_errors.NotImplemented,
    onnx_errors.RuntimeException,
)
WIDE = ("idf", "wide_weight", "surface_mean", "surface_scale", "surface_weight", "bias")  # in the order of wide.Wide


@dataclass(frozen=True, slots=True)
class Scores:
    """One prompt's calibrated scores in [0, 1], by head, in the checkpoint's pool order."""

    by_head: Mapping[str, tuple[float, ...]]  # NaN where the model's own outputs were not finite
    unfamiliar: bool = False  # unlike the prompts of the fit; False also where the checkpoint or the stage can't tell

    @property
    def finite(self) -> bool:
        """Whether they can be used."""
        return all(math.isfinite(value) for values in self.by_head.values() for value in values)

    @property
    def quality(self) -> tuple[float, ...]:
        return self.by_head["quality"]

    @property
    def token_confidence(self) -> tuple[float, ...]:
        return self.by_head["token_confidence"]


@dataclass(frozen=True, slots=True)
class Runtime:
    """A loaded checkpoint."""

    manifest: Manifest
    calibration: Calibration
    tokenizer: Tokenizer
    wide: wide.Wide | None  # None: there is no cheap stage
    session: onnxruntime.InferenceSession
    groups: Mapping[str, int] = field(default_factory=dict)  # the known ones, by name -> row of group_weight
    group_weight: NDArray[np.float32] | None = None  # (groups, O)

    @staticmethod
    def load(path: Path, threads: int = 1) -> Runtime:
        """Load and check a checkpoint directory. Raises ValueError: one sentence with what is wrong."""
        manifest, files = checkpoint.load_checkpoint(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry(
            "session.intra_op.allow_spinning", "0"
        )  # otherwise an idle gateway keeps a core busy
        options.log_severity_level = 3
        try:
            weights = safetensors.numpy.load(files[checkpoint.WEIGHTS])
            loaded = Runtime(
                manifest,
                calibration.loads(files[checkpoint.CALIBRATION]),
                text.load_tokenizer(files[checkpoint.TOKENIZER].decode()),
                wide.Wide(*(np.ascontiguousarray(weights[name], np.float32) for name in WIDE))
                if manifest.base.wide
                else None,
                onnxruntime.InferenceSession(files[checkpoint.ENCODER], options, providers=["CPUExecutionProvider"]),
                {name: number for number, name in enumerate(manifest.base.groups)},
                np.ascontiguousarray(weights["group_weight"], np.float32) if manifest.base.groups else None,
            )
        except (KeyError, ValueError, safetensors.SafetensorError, *ONNX_ERRORS) as error:
            raise ValueError(f"checkpoint {path} can't be used: {error}") from None
        outputs = {loaded.session.get_outputs()[0].shape[-1]}
        outputs |= set() if loaded.wide is None else {len(loaded.wide.bias)}
        if loaded.group_weight is not None and loaded.group_weight.shape != (len(manifest.base.groups), *outputs):
            raise ValueError(f"checkpoint {path}: its weights of groups don't fit the manifest")
        if loaded.calibration.pools != manifest.pools or outputs != {len(manifest.pools) * len(manifest.heads)}:
            raise ValueError(
                f"checkpoint {path}: its files disagree with the manifest about the pools {manifest.pools}"
            )
        if any(set(stage) != set(manifest.heads) for stage in loaded.calibration.stages.values()):
            raise ValueError(f"checkpoint {path}: {checkpoint.CALIBRATION} and the manifest name different heads")
        return loaded

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def pools(self) -> tuple[str, ...]:
        return self.manifest.pools

    @property
    def has_cheap(self) -> bool:
        """Whether there is a wide part, which cheap() and cheap_logits() need."""
        return self.wide is not None

    def prepare(self, prompt: str, context: str = "", group: str = "") -> Prepared:
        """Text -> ids, by the manifest.

        Args:
            context: the conversation before the prompt, newest last.
            group: the name of the prompt's task, if known.
        """
        return text.prepare(self.tokenizer, self.manifest.text, prompt, context, group)

    def cheap(self, batch: Sequence[Prepared]) -> list[Scores]:
        """Scores of the wide part alone: about 0.1 ms a prompt. Raises ValueError without one (has_cheap)."""
        return self._scores(self.cheap_logits(batch), "cheap")

    def score(self, batch: Sequence[Prepared]) -> list[Scores]:
        """Scores of the encoder and, if there is one, the wide part: a few ms a prompt."""
        logits_BO, unfamiliar_B = self.full(batch)
        return self._scores(logits_BO, "full", unfamiliar_B)

    def cheap_logits(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """(B, O) before calibration. Raises ValueError without a wide part (has_cheap)."""
        if self.wide is None:
            raise ValueError(f"checkpoint {self.version} has no wide part, and therefore no cheap stage")
        logits = np.stack([wide.wide_logits(self.wide, prepared.ids, prepared.surface) for prepared in batch])
        return self._with_groups(logits, batch)

    def full_logits(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """(B, O) before calibration, as they are served: those of unfamiliar prompts are drawn to the mean."""
        return self.full(batch)[0]

    def full(self, batch: Sequence[Prepared]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """`full_logits` (B, O), and which prompts (B,) are unfamiliar: none where the checkpoint can't tell."""
        ids_BT = np.zeros((len(batch), max(len(prepared.ids) for prepared in batch)), np.int64)
        mask_BT = np.zeros_like(ids_BT)
        for row, prepared in enumerate(batch):
            ids_BT[row, : len(prepared.ids)] = prepared.ids
            mask_BT[row, : len(prepared.ids)] = 1
        deep_BO, *rest = self.session.run(None, {"input_ids": ids_BT, "attention_mask": mask_BT})
        logits_BO: NDArray[np.float32] = deep_BO if self.wide is None else self.cheap_logits(batch) + deep_BO
        if self.wide is None:
            logits_BO = self._with_groups(logits_BO, batch)
        familiarity = self.calibration.familiarity
        if not rest or familiarity is None:
            return logits_BO, np.zeros(len(batch), np.bool_)
        logits_BKH = self.calibration.trusted(split_heads(logits_BO, len(self.manifest.heads)), rest[0])
        unfamiliar_B: NDArray[np.bool_] = rest[0] > familiarity.far
        return logits_BKH.reshape(logits_BO.shape).astype(np.float32), unfamiliar_B

    def _with_groups(self, logits_BO: NDArray[np.float32], batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """The logits with what the prompts' groups add, where the checkpoint knows them."""
        if self.group_weight is None:
            return logits_BO
        rows = [row for row, prepared in enumerate(batch) if prepared.group in self.groups]
        told = logits_BO.copy()
        told[rows] += self.group_weight[[self.groups[batch[row].group] for row in rows]]
        return told

    def _scores(
        self, logits_BO: NDArray[np.float32], stage: str, unfamiliar_B: NDArray[np.bool_] | None = None
    ) -> list[Scores]:
        logits_BKH = split_heads(logits_BO, len(self.manifest.heads))
        known = np.where(np.isfinite(logits_BKH), logits_BKH, np.nan)  # an infinite logit is no certainty
        by_head = calibrate_heads(self.calibration.stages[stage], known, self.manifest.heads)
        rows = {head: [tuple(row) for row in values.tolist()] for head, values in by_head.items()}
        unfamiliar = [False] * len(logits_BO) if unfamiliar_B is None else unfamiliar_B.tolist()
        return [
            Scores({head: rows[head][number] for head in rows}, unfamiliar[number]) for number in range(len(logits_BO))
        ]
