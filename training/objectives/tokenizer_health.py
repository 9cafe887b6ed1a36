"""Watch a tokenizer's run: whether the images come through, and how the codebook is used."""

from __future__ import annotations

from torch import Tensor

from tokenizer_image import Reconstruction
from training.config.tokenizer import TokenizerRunConfig
from training.engine.processes import Processes
from training.objectives.codebook_health import CodebookHealth
from training.objectives.reconstruction_health import ReconstructionHealth


class TokenizerHealth:
    """The numbers and warnings of a tokenizer's run beside its losses."""

    def __init__(self, config: TokenizerRunConfig, group: Processes, images: int) -> None:
        """images: in an epoch."""
        self.codebook = CodebookHealth(config, group, images)
        self.reconstruction = ReconstructionHealth(config, group)

    def update(self, image: Tensor, result: Reconstruction, restarts: int, step: int) -> None:
        """Add one micro-batch [B, 3, S, S] of step 0.., and the codes that were restarted in it."""
        self.codebook.update(result.codes, restarts)
        self.reconstruction.update(image, result.reconstruction, step)

    def report(self) -> dict[str, float]:
        """Return the numbers of a log line. All processes must call it."""
        numbers = self.reconstruction.report()
        return self.codebook.report(self.reconstruction.is_blank) | numbers

    def state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint."""
        return {f"{part}.{name}": tensor for part, watch in self._parts().items()
                for name, tensor in watch.state().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from `state`."""
        for part, watch in self._parts().items():
            prefix = f"{part}."
            watch.restore({name.removeprefix(prefix): tensor for name, tensor in state.items()
                           if name.startswith(prefix)})

    def _parts(self) -> dict[str, CodebookHealth | ReconstructionHealth]:
        return {"codebook": self.codebook, "reconstruction": self.reconstruction}
