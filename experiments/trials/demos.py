"""Lightning's own demos, and a GAN: `python -m experiments.trials.demos`."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos import LightningLSTM, LightningTransformer, SequenceSampler, WikiText2
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from torch.utils.data import DataLoader

from experiments.trials.adversarial import gan
from experiments.trials.trial import QUIET, Trial, main

LIBRARY = "lightning"
GAN = "digits; a GAN, judged by the energy distance"


def words() -> WikiText2:
    """Python's help texts in the place of Wikipedia's, which would have to be fetched.

    The demos look for a file of this name before they fetch it.
    """
    path = Path("data/wikitext-2.txt")
    path.parent.mkdir(exist_ok=True)
    text = "\n".join(topics[name] for name in sorted(topics))
    path.write_text(text[:30_000], encoding="utf-8")
    return WikiText2()


def transformer(callbacks: list[Callback]) -> None:
    """Sequence to sequence, 6 attentions; a batch is one stretch of 35 words by default."""
    data = words()
    loader = DataLoader(data, batch_size=8, shuffle=True)
    module = LightningTransformer(data.vocab_size)
    L.Trainer(max_steps=150, callbacks=callbacks, **QUIET).fit(module, loader)


def lstm(callbacks: list[Callback]) -> None:
    """Truncated backpropagation through time: the hidden state stays from batch to batch."""
    data = words()
    loader = DataLoader(data, batch_sampler=SequenceSampler(data, batch_size=20))
    module = LightningLSTM(data.vocab_size)
    L.Trainer(max_steps=30, callbacks=callbacks, **QUIET).fit(module, loader)


def boring(callbacks: list[Callback]) -> None:
    """One linear layer, whose output is to be one everywhere; returns a dict."""
    trainer = L.Trainer(max_epochs=2, limit_val_batches=0, callbacks=callbacks, **QUIET)
    trainer.fit(BoringModel())


def manual(callbacks: list[Callback]) -> None:
    """The same, stepping by itself."""
    trainer = L.Trainer(max_epochs=2, limit_val_batches=0, callbacks=callbacks, **QUIET)
    trainer.fit(ManualOptimBoringModel())


TRIALS = [
    Trial("demo_transformer", LIBRARY, "words; cross entropy", transformer),
    Trial("demo_lstm", LIBRARY, "words; cross entropy", lstm),
    Trial("demo_boring", LIBRARY, "ones; squared error", boring),
    Trial("demo_manual", LIBRARY, "ones; squared error", manual),
    Trial("demo_gan", LIBRARY, GAN, gan),
    Trial("demo_gan_small", LIBRARY, GAN, gan, {"kl_radius": 0.003, "momentum": 0.5}),
]

if __name__ == "__main__":
    main(TRIALS)
