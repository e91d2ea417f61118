"""The entry point of a project shaped like lightning-hydra-template; it knows no ngplugin."""

import sys
from pathlib import Path

import hydra
import lightning as L
from hydra.utils import instantiate

sys.path.insert(0, str(Path(__file__).parents[1]))


@hydra.main(version_base="1.3", config_path="../configs", config_name="train.yaml")
def main(cfg):
    L.seed_everything(cfg.seed, workers=True)
    datamodule = instantiate(cfg.data)
    model = instantiate(cfg.model)
    callbacks = [instantiate(node) for node in (cfg.get("callbacks") or {}).values()]
    logger = [instantiate(node) for node in (cfg.get("logger") or {}).values()]
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=logger)
    trainer.fit(model, datamodule=datamodule)
    print(f"val/loss {float(trainer.callback_metrics['val/loss']):.6f}")


if __name__ == "__main__":
    main()
