"""A checkpoint -> scores, without torch: ONNX Runtime, tokenizers, numpy. Safe to call from several threads at once.

Shapes: B prompts, T tokens, K pools, H = 2K outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as onnx_errors
from tokenizers import Tokenizer

from depo_gateway.estimator import calibration, checkpoint, text, wide
from depo_gateway.estimator.calibration import Calibration
from depo_gateway.estimator.checkpoint import Manifest
from depo_gateway.estimator.text import Prepared

# ONNX Runtime's errors share no ancestor but Exception
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
    """One prompt's calibrated scores in [0, 1], in the checkpoint's pool order."""

    quality: tuple[float, ...]
    token_confidence: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Runtime:
    """A loaded checkpoint."""

    manifest: Manifest
    calibration: Calibration
    tokenizer: Tokenizer
    wide: wide.Wide | None  # None: there is no cheap stage
    session: onnxruntime.InferenceSession

    @staticmethod
    def load(path: Path, threads: int = 1) -> Runtime:
        """Load and check a checkpoint directory. Raises ValueError with one sentence saying what is wrong with it."""
        manifest, files = checkpoint.load_checkpoint(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or an idle gateway burns a core
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
            )
        except (KeyError, ValueError, safetensors.SafetensorError, *ONNX_ERRORS) as error:
            raise ValueError(f"checkpoint {path} can't be used: {error}") from None
        outputs = {loaded.session.get_outputs()[0].shape[-1]}
        outputs |= set() if loaded.wide is None else {len(loaded.wide.bias)}
        if loaded.calibration.pools != manifest.pools or outputs != {2 * len(manifest.pools)}:
            raise ValueError(
                f"checkpoint {path}: its files disagree with the manifest about the pools {manifest.pools}"
            )
        return loaded

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def pools(self) -> tuple[str, ...]:
        return self.manifest.pools

    @property
    def has_cheap(self) -> bool:
        """Whether the wide part is there, and so cheap() and cheap_logits()."""
        return self.wide is not None

    def prepare(self, prompt: str, context: str = "") -> Prepared:
        """Text -> ids, by the manifest. `context` is the conversation before the prompt, newest last."""
        return text.prepare(self.tokenizer, self.manifest.text, prompt, context)

    def cheap(self, batch: Sequence[Prepared]) -> list[Scores]:
        """Scores of the wide part alone: about 0.1 ms a prompt. Raises ValueError where there is none (has_cheap)."""
        return self._scores(self.cheap_logits(batch), "cheap")

    def score(self, batch: Sequence[Prepared]) -> list[Scores]:
        """Scores of encoder and, if there is one, wide part together: some ms a prompt."""
        return self._scores(self.full_logits(batch), "full")

    def cheap_logits(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """(B, H) before calibration. Raises ValueError where there is no wide part (has_cheap)."""
        if self.wide is None:
            raise ValueError(f"checkpoint {self.version} has no wide part, and so no cheap stage")
        return np.stack([wide.wide_logits(self.wide, prepared.ids, prepared.surface) for prepared in batch])

    def full_logits(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """(B, H) before calibration."""
        ids_BT = np.zeros((len(batch), max(len(prepared.ids) for prepared in batch)), np.int64)
        mask_BT = np.zeros_like(ids_BT)
        for row, prepared in enumerate(batch):
            ids_BT[row, : len(prepared.ids)] = prepared.ids
            mask_BT[row, : len(prepared.ids)] = 1
        (deep_BH,) = self.session.run(None, {"input_ids": ids_BT, "attention_mask": mask_BT})
        result: NDArray[np.float32] = deep_BH if self.wide is None else self.cheap_logits(batch) + deep_BH
        return result

    def _scores(self, logits_BH: NDArray[np.float32], stage: str) -> list[Scores]:
        quality_BK, token_BK = calibration.apply_calibration(
            self.calibration.stages[stage], logits_BH.reshape(len(logits_BH), len(self.pools), 2)
        )
        return [Scores(tuple(q), tuple(t)) for q, t in zip(quality_BK.tolist(), token_BK.tolist(), strict=True)]
