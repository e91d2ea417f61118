"""A LightningCLI program that knows nothing of ngplugin, under the name in its first argument."""

import importlib
import sys

L = importlib.import_module(sys.argv.pop(1))
demo = importlib.import_module(f"{L.__name__}.demos.boring_classes")
cli = importlib.import_module(f"{L.__name__}.cli").LightningCLI(demo.BoringModel)
(optimizer,) = cli.trainer.strategy.optimizers
print(type(optimizer).__name__, optimizer.options.kl_radius)
