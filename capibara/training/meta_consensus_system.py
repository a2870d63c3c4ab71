"""`MetaConsensusSystem`: the specification's name for a consensus run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from capibara.consensus.config import ConsensusConfig
from capibara.core.config import ModularConfig
from capibara.core.model import ModularCapibaraModel
from capibara.errors import ConfigError
from capibara.training.results import ConsensusResults
from capibara.training.session import Session, open_session, reopen_session
from capibara.types import Source


class MetaConsensusSystem:
    """n nodes train, vote and leave a certificate of every merge.

    Args:
      config: The consensus; the default is four nodes.
      base: Model, data and training of the run; the preset `development` if None.

    Attributes:
      config: The consensus configuration.
      session: The session of the last `train`, whose `plan` holds the parts that it built.

    Equivalent to:
      base = ModularConfig.preset("development").replace(data={"path": data_path}, training={...})
      config = ModularConfig(model=base.model, data=base.data, training=base.training, consensus=consensus)
      with open_session(config, model=model) as session:
          results = session.train()
    """

    def __init__(self, config: ConsensusConfig | None = None, *, base: ModularConfig | None = None):
        self.config = config or ConsensusConfig()
        self.base = base or ModularConfig.preset("development")
        self.session: Session | None = None

    def train(
        self,
        model: Any = None,
        data_path: str | Sequence[str] | None = None,
        num_epochs: float | None = None,
        strategies: Sequence[Any] | None = None,
        *,
        num_rounds: int | None = None,
        run_dir: str | Path | None = None,
        resume: bool = False,
        source: Source | None = None,
        loss: Callable[..., Any] | None = None,
        progress: bool = False,
        **training: Any,
    ) -> ConsensusResults:
        """Trains by consensus.

        Args:
          model: Any NNX model with `loss(batch)`; the base configuration's decoder if None.
          data_path: Folder or files of text, or `demo:sotu`.
          num_epochs: Passes over the training tokens of all nodes.
          strategies: Names or `Strategy` objects, dealt to the nodes round-robin.
          num_rounds: Rounds, instead of `num_epochs`.
          run_dir: Where the run is kept; `runs/consensus-N` if None.
          resume: Go on with the run in `run_dir`, where there is one; it ends as if it had never stopped.
          source: Batches of the user's own, instead of `data_path`.
          loss: `(model, batch, key) -> scalar`, instead of the model's own.
          progress: Show each round on standard error.
          **training: Values of the `training` section, e.g. `batch_size=16`.

        Returns:
          `consensus_model`, `rounds`, `history`, `certificate_path`, `summary()`.

        Raises:
          ConfigError: If the configuration cannot be meant as written.
          QuorumError: If a round found no quorum; the incumbent and the run directory are intact.
        """
        parts = {"model": model, "source": source, "loss": loss}
        given = {"num_epochs": num_epochs, "num_rounds": num_rounds, **training}
        chosen = {name: value for name, value in given.items() if value is not None}
        if num_epochs is not None and num_rounds is None:
            chosen["num_rounds"] = None
        changed = self.base.replace(training=chosen, data={} if data_path is None else {"path": data_path})
        shape = model.config if isinstance(model, ModularCapibaraModel) else changed.model
        consensus = self.config
        if strategies is not None:
            values = {name: getattr(consensus, name) for name in type(consensus).model_fields}
            consensus = ConsensusConfig(**{**values, "strategies": tuple(strategies)})
        config = ModularConfig(model=shape, data=changed.data, training=changed.training, consensus=consensus)
        if resume and run_dir is None:
            raise ConfigError("resume goes on with the run in run_dir; name that directory.")
        if resume and run_dir is not None and Path(run_dir, "format.json").exists():
            self.session = reopen_session(Path(run_dir), config=config, **parts)
        else:
            self.session = open_session(config, run_dir=Path(run_dir) if run_dir else None, kind="consensus", **parts)
        with self.session as session, session.display(enabled=progress) as display:
            return session.train(display)
